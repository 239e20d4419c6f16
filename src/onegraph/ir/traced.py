"""What a tracer found out about Python, as data: what it read and relied on, and the calls that it ran and kept."""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

FoldKind = Literal["declared", "state", "installation"]


@dataclass(frozen=True)
class GuardFact:
    """A guard that Dynamo would have installed.

    `name` is a Python expression over `L` (the traced function's locals), `G` (its globals) and the functions of
    `torch_compat.guards.expression_scope`; empty for torch's global state. `kind` is the name of Dynamo's check,
    `keywords` what it was given (`attr`, `key`), `user` the `file:line` that read the value, outside of torch if there
    is one.
    """

    name: str
    kind: str
    user: str | None
    keywords: Mapping[str, Any]


@dataclass(frozen=True)
class FoldedCall:
    """A call that was run while tracing, and its result, which the graph keeps.

    `kind` says what the result depends on: `declared` on what only the user knows, who marked the function as
    constant; `state` on state of torch or of the interpreter, which may change in a process; `installation` on
    the installed packages. `user` is the `file:line` of the call.
    """

    kind: FoldKind
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any
    user: str | None


@dataclass(frozen=True)
class UsedBuiltin:
    """A builtin that traced code named, and the globals of this code, which don't hide it."""

    name: str
    globals_read: Mapping[str, Any]
    user: str


@dataclass(frozen=True)
class Places:
    """Two places as the sources of guards; `user` is the `file:line` of the traced code."""

    left: str
    right: str
    user: str | None


@dataclass(frozen=True)
class TraceFacts:
    """All that one trace relied on.

    `sources` says for each of the graph's inputs where residual code takes its value from. `asked` are facts beside
    the guards, about tensors. `same` are places of one object, `compared` those of tensors that were taken for two.
    `functions` are the inlined ones, as qualified name and digest of the code. `environment_user` is the line that
    read the process's variables, None if nothing did. `stored_attributes` are the names of attributes that residual
    code sets, of whatever object, and `counted` the sources of the ints that are inputs of the graph.
    """

    sources: tuple[str, ...]
    guards: tuple[GuardFact, ...]
    asked: tuple[GuardFact, ...]
    same: tuple[Places, ...]
    compared: tuple[Places, ...]
    builtins: tuple[UsedBuiltin, ...]
    folded: tuple[FoldedCall, ...]
    functions: frozenset[tuple[str, str]]
    asks_for_gradients: bool
    environment_user: str | None
    stored_attributes: frozenset[str]
    counted: frozenset[str]


@dataclass(frozen=True)
class Residual:
    """The code that Dynamo leaves of a traced function: it calls the graph as `graph`, and redoes Python's part.

    `globals_used` are the names of globals that it reads, `imports` modules by the names that it has for them, and
    `installed` further globals that Dynamo made for it. `foreign_closure` says that its closure isn't that of the
    traced function.
    """

    code: types.CodeType
    graph: str
    globals_used: tuple[str, ...]
    imports: Mapping[str, str]
    installed: Mapping[str, Any]
    argdefs: tuple[Any, ...] | None
    kwdefaults: Mapping[str, Any] | None
    closure: tuple[Any, ...] | None
    foreign_closure: bool

    def missing(self, function: types.FunctionType) -> list[str]:
        """The globals that the code reads and that it wouldn't have as `function`'s."""
        known = {*self.imports, *self.installed, *function.__globals__, *vars(builtins)}
        return [name for name in self.globals_used if name not in known]

    def bind(
        self, function: types.FunctionType, run: Callable[..., Any], module: Callable[[str], Any]
    ) -> Callable[..., Any]:
        """A function with the signature of the traced `function` (with its `self`) that calls `run(*inputs)`.

        `module(name)` gives an imported module, or what stands for it.
        """
        names = {
            **self.installed,
            **function.__globals__,
            **{alias: module(name) for alias, name in self.imports.items() if alias in self.globals_used},
            self.graph: run,
        }
        own = function.__closure__ if self.code.co_freevars else None
        closure = self.closure if self.foreign_closure else own
        residual = types.FunctionType(self.code, names, argdefs=self.argdefs, closure=closure)
        residual.__kwdefaults__ = dict(self.kwdefaults) if self.kwdefaults else None
        return residual
