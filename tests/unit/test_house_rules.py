"""Rules of the house that a linter doesn't check whole: private torch, devices, the environment, names, docs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src/onegraph"
MODULES = sorted(SOURCE.rglob("*.py"))


def dotted_names(path: Path) -> Iterator[tuple[str, int]]:
    """Every dotted name that a module imports or uses, with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            parts: list[str] = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield ".".join([inner.id, *reversed(parts)]), node.lineno


def is_private_torch(name: str) -> bool:
    first, *rest = name.split(".")
    return first == "torch" and (
        any(part.startswith("_") and not part.startswith("__") for part in rest) or "fx.experimental" in name
    )


def uses(is_banned: object, *, allowed_in: str) -> list[str]:
    assert callable(is_banned)
    return [
        f"{path.relative_to(SOURCE)}:{line}: {name}"
        for path in MODULES
        if not str(path.relative_to(SOURCE)).startswith(allowed_in)
        for name, line in dotted_names(path)
        if is_banned(name)
    ]


def test_private_torch_only_in_torch_compat() -> None:
    assert uses(is_private_torch, allowed_in="torch_compat/") == []


def test_torch_cuda_only_in_its_target() -> None:
    assert uses(lambda name: name.startswith("torch.cuda"), allowed_in="targets/cuda/") == []


def test_the_environment_only_in_env() -> None:
    assert uses(lambda name: name in ("os.environ", "os.getenv", "os.putenv"), allowed_in="env.py") == []


@pytest.mark.parametrize(
    ("name", "private"),
    [
        ("torch._dynamo.config", True),
        ("torch.fx.experimental.symbolic_shapes", True),
        ("torch.utils._sympy.functions", True),
        ("torch.nn.Module.__call__", False),
        ("torch.library.Library", False),
        ("self._torch", False),
    ],
)
def test_what_counts_as_private(name: str, private: bool) -> None:
    assert is_private_torch(name) is private


def test_every_module_says_what_it_is() -> None:
    assert [path.name for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_no_file_is_named_for_nothing() -> None:
    empty = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
    assert [path for path in MODULES if empty & set(path.stem.split("_"))] == []


def test_files_stay_readable() -> None:
    assert {path.name: lines for path in MODULES if (lines := len(path.read_text().splitlines())) > 450} == {}
