"""Timers around the kernels that pieces call, while somebody profiles; and what of the graph each call computes.

A piece's Python looks its kernels up among its names in each call. Here other objects stand there for a time, which
call the same kernels in spans of a clock. The calls of a run come in the order of the text, so that the number of a
call finds its place there, and the comment above it, which names the nodes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from onegraph.compilers.wrapper import OWN_OPS, kernel_variables
from onegraph.ir.artifact import PieceSource
from onegraph.ir.step_clock import StepClock
from onegraph.ops.library import LIBRARY

_NODES = re.compile(r"^\s*# (?:Topologically Sorted|Unsorted) Source Nodes: \[(.*?)\]", re.MULTILINE)
_OWN_OP = re.compile(r"^    (\w+) = (__\w+)\(", re.MULTILINE)
_EXTERN, _TORCH, _OPERATORS = "extern_kernels", "torch", "torch.ops"
_LINEAR = f"{LIBRARY.ns}::linear"


class CallSite(NamedTuple):
    """A kernel's call in a piece's Python: the name that it is looked up by, and the nodes that it computes."""

    called: str
    nodes: tuple[str, ...]


def call_sites(source: PieceSource) -> tuple[CallSite, ...]:
    """The calls of kernels in the order in which they are made; none for a text in a form that isn't known."""
    own = [CallSite(op, (node,)) for node, op in _OWN_OP.findall(source.text)]
    return tuple(own or _of_wrapper(source.text))


def _of_wrapper(text: str) -> Iterator[CallSite]:
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    function = next((one for one in functions if one.name == "call"), None)
    lines, kernels, done = text.splitlines(), set(kernel_variables(text)), 0
    before: set[str] = set()
    for statement in _statements(function.body if function is not None else []):
        calls = (ast.unparse(node.func) for node in ast.walk(statement) if isinstance(node, ast.Call))
        names = [name.removesuffix(".run") for name in calls if _is_kernel(name, kernels)]
        if names:
            above = _NODES.findall("\n".join(lines[done : statement.lineno]))
            nodes = tuple(filter(None, above[-1].split(", "))) if above else ()
            if not kernels.issuperset(names):  # an operator, whose comment has the nodes of its inputs, too
                nodes = tuple(node for node in nodes if node not in before) or nodes
            before.update(nodes)
            yield from (CallSite(name, nodes) for name in names)
            done = statement.end_lineno or statement.lineno


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those that have no others in them, in order."""
    for statement in body:
        inner = getattr(statement, "body", None)
        if inner is None:
            yield statement
        else:
            yield from _statements(inner)


def _is_kernel(called: str, kernels: set[str]) -> bool:
    return called.removesuffix(".run") in kernels or called.startswith((f"{OWN_OPS}.", f"{_EXTERN}.", f"{_OPERATORS}."))


@contextmanager
def timed_kernels(sources: Iterable[PieceSource], clock: StepClock) -> Iterator[None]:
    """Inside, each kernel that these pieces call is a span of the clock."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for source in dict.fromkeys(sources):
            for name, timed in _timed_names(source, clock):
                replaced.append((source.names, name, source.names[name]))
                source.names[name] = timed
        yield
    finally:
        for names, name, original in reversed(replaced):
            names[name] = original


def _timed_names(source: PieceSource, clock: StepClock) -> Iterator[tuple[str, Any]]:
    for name in {*kernel_variables(source.text), *(op for _, op in _OWN_OP.findall(source.text)), OWN_OPS, _EXTERN}:
        if name in source.names:
            yield name, _Timed(source.names[name], name, source, clock)
    if f"{_OPERATORS}." in source.text:
        torch = source.names[_TORCH]
        yield _TORCH, _Torch(torch, _Timed(torch.ops, _OPERATORS, source, clock))


class _Torch:
    """Stands for `torch`, whose operators are timed."""

    def __init__(self, module: Any, ops: Any) -> None:
        self._module = module
        self.ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Timed:
    """Stands for a kernel, or for what has kernels as its attributes; `called` is what the piece calls it."""

    def __init__(self, value: Any, called: str, source: PieceSource, clock: StepClock) -> None:
        self._value, self._called, self._source, self._clock = value, called, source, clock
        self._kernel = called.removesuffix(".run")
        self._label = re.sub(rf"^({OWN_OPS}\.|__)", f"{LIBRARY.ns}::", self._kernel)

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__[name] = _Timed(
            getattr(self._value, name), f"{self._called}.{name}", self._source, self._clock
        )
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        label = self._label
        if label == _LINEAR:
            outputs, inputs = args[1].shape
            label = f"{label} {inputs} to {outputs}"
        self._clock.enter_kernel(label, self._source, self._kernel)
        try:
            return self._value(*args, **kwargs)
        finally:
            self._clock.leave()
