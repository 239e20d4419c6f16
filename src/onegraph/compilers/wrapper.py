"""Inductor's wrapper module, taken apart and put together: its kernels come from a library instead of a build.

Takes the Python text that Inductor wrote and the kernels that it would have built; gives the same text with each
build replaced by a look-up of the kernel's name in `kernels`. The result runs without Inductor's compile workers and
without a C++ compiler.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onegraph.errors import CompileError
from onegraph.ir.target import KernelSource

_BUILDS = {"async_compile.cpp_pybinding": "cpp", "async_compile.triton": "triton"}
"""What the wrapper's text calls to build a kernel, and the kernel's language."""


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
    result = "".join(lines)
    if remaining or "async_compile" in result:
        raise CompileError(
            f"Inductor's wrapper has {len(remaining)} kernels that its text doesn't name in a known form",
            where="torch._inductor's generated Python",
            hint="report this with your torch version; -O.backend=aot_eager runs without Inductor",
        )
    return result


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


def put_together(path: Path, source: str, kernels: Mapping[str, Any], constants: Mapping[str, Any]) -> dict[str, Any]:
    """Executes the wrapper's text with its kernels and constants; gives its names, of which `call` takes one list.

    `path` is the file that tracebacks and debuggers show.
    """
    namespace: dict[str, Any] = {
        "__name__": "onegraph_artifact",
        "__file__": str(path),
        "kernels": kernels,
        **constants,
    }
    exec(compile(source, str(path), "exec"), namespace)  # noqa: S102 - an artifact is code, verified by the store
    return namespace


def execute(name: str, source: str, namespace: dict[str, Any]) -> None:
    """Executes further text among a wrapper's names; tracebacks and debuggers show it under `name`."""
    filename = f"<{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), namespace)  # noqa: S102 - made of an artifact's own text
