"""Inductor's wrapper module, taken apart and put together: its kernels come from a library instead of a build.

Takes the Python text that Inductor wrote and the kernels that it would have built; gives the same text with each
build replaced by a look-up of the kernel's name in `kernels`, and each call of an op of ours that writes into planned
memory by one of a plain function in `own_ops`. The result runs without Inductor's compile workers and without a C++
compiler.
"""

from __future__ import annotations

import ast
import linecache
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from onegraph.errors import CompileError
from onegraph.ir.target import KernelSource
from onegraph.ops.library import LIBRARY, OutFunctions
from onegraph.torch_compat.recorded_ops import noted

_BUILDS = {"async_compile.cpp_pybinding": "cpp", "async_compile.triton": "triton"}
"""What the wrapper's text calls to build a kernel, and the kernel's language."""

OWN_OPS = "own_ops"
_ALLOCATORS = {"empty_strided_cpu"}
"""Functions of the wrapper that make tensors without torch's dispatcher. Those for GPUs go through an allocator that
recordings know."""
_KERNEL = re.compile(r"^(\w+) = kernels\['(\w+)'\]$", re.MULTILINE)
_OUT_CALL = re.compile(rf"\btorch\.ops\.{LIBRARY.ns}\.(\w+)\.out(?=\()")


def take_apart(source: str, kernels: tuple[KernelSource, ...]) -> str:
    """Gives the wrapper's text without builds; `kernels` are those that it builds, in order.

    Raises CompileError where the text has a form that this version doesn't know.
    """
    lines = source.splitlines(keepends=True)
    remaining = list(kernels)
    for node in ast.parse(source).body:
        text = _replacement(node, remaining)
        if text is not None:
            lines[node.lineno - 1] = text
            for number in range(node.lineno, node.end_lineno or node.lineno):
                lines[number] = ""
    result = _without_imports_of_inductor(_OUT_CALL.sub(rf"{OWN_OPS}.\1", "".join(lines)))
    if remaining or "async_compile" in result:
        raise CompileError(
            f"Inductor's wrapper has {len(remaining)} kernels that its text doesn't name in a known form",
            where="torch._inductor's generated Python",
            hint="report this with your torch version; -O.backend=aot_eager runs without Inductor",
        )
    return result


def _without_imports_of_inductor(source: str) -> str:
    """The text without what it imports of Inductor and doesn't use: a warm start shall not wait for Inductor's import.

    Operators that aren't compiled (`extern_kernels.mm`) are mostly torch's own functions, and then taken from torch.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("torch._inductor"):
            continue
        names = [alias.asname or alias.name for alias in node.names]
        used = [name for name in names if len(re.findall(rf"\b{name}\b", source)) > 1]
        text = ""
        if used == ["extern_kernels"]:
            called = set(re.findall(r"\bextern_kernels\.(\w+)", source))
            kernels = sys.modules["torch._inductor.select_algorithm"].extern_kernels
            if not all(getattr(kernels, name, None) is getattr(torch, name, "") for name in called):
                continue
            text = "extern_kernels = torch\n"
        elif used:
            continue
        lines[node.lineno - 1] = text
        for number in range(node.lineno, node.end_lineno or node.lineno):
            lines[number] = ""
    return "".join(lines)


def _replacement(node: ast.stmt, remaining: list[KernelSource]) -> str | None:
    """The line to put in place of a statement that builds or waits; None leaves the statement as it is."""
    if isinstance(node, ast.ImportFrom) and any(alias.name == "AsyncCompile" for alias in node.names):
        return "\n"
    if isinstance(node, ast.Delete) and "async_compile" in ast.unparse(node):
        return "\n"
    if isinstance(node, ast.Expr) and ast.unparse(node).startswith("async_compile."):
        return "\n"
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
        return None
    called = ast.unparse(node.value.func)
    if called == "AsyncCompile":
        return "\n"
    language = _BUILDS.get(called)
    if language is None or not remaining or remaining[0].language != language:
        return None
    if language == "triton" and ast.unparse(node.value.args[0]) != repr(remaining[0].function):
        return None
    return f"{ast.unparse(node.targets[0])} = kernels[{remaining.pop(0).name!r}]\n"


def kernel_variables(source: str) -> list[str]:
    """The names by which a wrapper without builds calls its kernels."""
    return [name for name, _ in _KERNEL.findall(source)]


def kernel_names(source: str) -> dict[str, str]:
    """The kernels that a wrapper without builds looks up, each with its name there."""
    return {kernel: name for name, kernel in _KERNEL.findall(source)}


def put_together(
    path: Path, source: str, kernels: Mapping[str, Any], own_ops: OutFunctions, constants: Mapping[str, Any]
) -> dict[str, Any]:
    """Executes the wrapper's text with its functions and constants; gives its names, of which `call` takes one list.

    `path` is the file that tracebacks and debuggers show.
    """
    namespace: dict[str, Any] = {
        "__name__": "onegraph_artifact",
        "__file__": str(path),
        "kernels": kernels,
        OWN_OPS: own_ops,
        **constants,
    }
    exec(compile(source, str(path), "exec"), namespace)  # noqa: S102 - an artifact is code, verified by the store
    for name in _ALLOCATORS & namespace.keys():
        namespace[name] = noted(namespace[name])
    return namespace


def execute_as(path: Path, source: str, lines: Sequence[int], namespace: dict[str, Any]) -> None:
    """As `execute`, but shown as lines of a file: `lines` has the file's line for each of the text, 0 for none."""
    tree = ast.parse(source)
    first = next(filter(None, lines), 1)
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr):
            node.lineno = node.end_lineno = lines[node.lineno - 1] or first
            node.col_offset = node.end_col_offset = 0
    exec(compile(tree, str(path), "exec"), namespace)  # noqa: S102 - made of an artifact's own text


def execute(name: str, source: str, namespace: dict[str, Any]) -> None:
    """Executes further text among a wrapper's names; tracebacks and debuggers show it under `name`."""
    filename = f"<{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), namespace)  # noqa: S102 - made of an artifact's own text
