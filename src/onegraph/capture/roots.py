"""The expressions of Dynamo's guards, rooted in objects: readable at any time, without the frame that was traced.

Takes an expression over the traced function's locals and globals (`L['self'].scale`, `G['TABLE']['first']`); gives
the expression with its roots replaced by names, these names, and the text that the user would write.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from onegraph.capture.expression_text import ExpressionText, last_step
from onegraph.capture.inputs import CallInputs
from onegraph.capture.state_check import LITERALS


@dataclass(frozen=True)
class Scope:
    """What the names in guard expressions mean: `constants` are objects that stand for whole prefixes.

    `self_in_rest` names the traced function's `*args` whose first is its `self`, which a call's own don't have;
    `self_prefix` is the expression for this `self`, if there is one.
    """

    globals_read: Mapping[str, Any]
    constants: Mapping[str, Any]
    self_in_rest: str = ""
    self_prefix: str = ""
    known: dict[str, _Rooted] = field(default_factory=dict, compare=False)
    """What was worked out before: expressions share prefixes."""


def scope_of(function: Any, owner: Any, inputs: CallInputs, globals_read: Mapping[str, Any]) -> Scope:
    constants: dict[str, Any] = {}
    rest, prefix = inputs.signature.self_in_rest, ""
    if owner is not None:
        prefix = f"L['{rest}'][0]" if rest else f"L['{function.__code__.co_varnames[0]}']"
        constants[prefix] = owner
    for leaf in inputs.leaves:
        if not isinstance(leaf.value, (torch.Tensor, *LITERALS)):
            constants[leaf.source] = constants[leaf.indexed_source] = leaf.value
    for container in inputs.containers:  # the contract compares its class
        constants[f"type({container.source})"] = container.kind
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        constants[f"L['{name}']"] = constants[f"L[{name!r}]"] = _Cell(cell)
    return Scope(globals_read, constants, rest, prefix)


@dataclass(frozen=True)
class _Cell:
    """Marks a local of the traced function that is a closure variable, read through its cell."""

    cell: Any


def rooted_expression(name: str, scope: Scope) -> tuple[str, dict[str, Any]] | None:
    """The guard's expression with its roots replaced by names, and these names; None if it is about an argument."""
    rooted = _rooted(name, scope)
    return None if rooted.arguments else (rooted.text, dict(rooted.names))


def argument_expression(name: str, scope: Scope, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The guard's expression over the arguments' names and the names of its other roots; None for any other one."""
    rooted = _rooted(name, scope)
    known = rooted.arguments and rooted.arguments <= arguments.keys()
    return (rooted.text, dict(rooted.names)) if known else None


@dataclass(frozen=True)
class _Rooted:
    """An expression with its roots replaced: the names of these, and the arguments that it is about."""

    text: str
    names: Mapping[str, Any]
    arguments: frozenset[str]


def _rooted(name: str, scope: Scope) -> _Rooted:
    known = scope.known.get(name)
    if known is None:
        known = scope.known[name] = _with_last_step(name, scope) or _by_parsing(name, scope)
    return known


def _with_last_step(name: str, scope: Scope) -> _Rooted | None:
    """Of the prefix's roots, where the last step of a plain chain has no meaning of its own."""
    prefix, step = last_step(name) or ("", "")
    if not prefix or prefix in ("L", "G", f"L['{scope.self_in_rest}']") or name in scope.constants:
        return None
    inner = _rooted(prefix, scope)
    return _Rooted(f"{inner.text}{step}", inner.names, inner.arguments)


def _by_parsing(name: str, scope: Scope) -> _Rooted:
    roots = _Roots(scope)
    tree = roots.visit(ast.parse(name, mode="eval").body)
    return _Rooted(ExpressionText()(tree), roots.names, frozenset(roots.arguments))


class _Roots(ast.NodeTransformer):
    """Replaces `L[...]`, `G[...]` and function names by names of constants; drops copies (`dict(x)['a']`)."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.arguments: set[str] = set()
        self.names: dict[str, Any] = {}
        self.text = ExpressionText()  # of nodes as they were before their visit, which begins with the outermost

    def constant(self, value: Any) -> ast.Name:
        name = f"_k{id(value):x}"
        self.names[name] = value
        return ast.Name(name, ast.Load())

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Subscript | ast.Attribute | ast.Call):
            known = self.scope.constants.get(self.text(node), self)
            if isinstance(known, _Cell):
                return ast.Attribute(self.constant(known.cell), "cell_contents", ast.Load())
            if known is not self:
                return self.constant(known)
        return super().visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id == "L":
            key = node.slice.value if isinstance(node.slice, ast.Constant) else self.text(node.slice)
            self.arguments.add(str(key))
            return ast.Name(str(key), ast.Load())
        if self.scope.self_in_rest and self.text(node.value) == f"L['{self.scope.self_in_rest}']":
            node = ast.Subscript(node.value, ast.Constant(int(self.text(node.slice)) - 1), ast.Load())
            return self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id == "G" and isinstance(node.slice, ast.Constant):
            key = str(node.slice.value)
            if key.startswith(("__import_", "__builtins_dict__")):  # Dynamo's own names for a module
                return self.constant(_of_dynamo(key))
            return ast.Subscript(self.constant(self.scope.globals_read), node.slice, ast.Load())
        if (
            isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Name)
            and node.value.func.id == "dict"
            and self.text(node.value).endswith(".__dict__)")
        ):
            return self.generic_visit(ast.Subscript(node.value.args[0], node.slice, ast.Load()))
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> Any:
        function = None if hasattr(builtins, node.id) else _functions().get(node.id)
        return node if function is None else self.constant(function)


@functools.cache
def _functions() -> dict[str, Any]:
    from onegraph.torch_compat.guards import expression_scope  # takes seconds to import, and is rarely needed

    return expression_scope()


def _of_dynamo(name: str) -> Any:
    """What Dynamo has under a name of its own: a module, or the builtins."""
    if name.startswith("__builtins_dict__"):
        return vars(builtins)
    return importlib.import_module(name.removeprefix("__import_").replace("_dot_", "."))


def root(value: Any) -> tuple[str, dict[str, Any]]:
    """An object as the root of an expression."""
    name = f"_k{id(value):x}"
    return name, {name: value}


_REGISTERED = re.compile(r"\._(?:modules|parameters|buffers)\['([^']*)'\]")
_OWN_DICT = re.compile(r"dict\((.*?)\.__dict__\)\['([^']*)'\]")
_IMPORTED = re.compile(r"G\['__import_([^']*)'\]")
_BUILTINS = re.compile(r"G\['__builtins_dict__[^']*'\]\['([^']*)'\]")
_GLOBAL = re.compile(r"G\['([^']*)'\]")
_LOCAL = re.compile(r"L\['([^']*)'\]")


def as_written(name: str, scope: Scope) -> str:
    """The expression as its user would write it: `self.layers.0.scale`."""
    text = _REGISTERED.sub(r".\1", name)
    if "dict(" in text:
        text = _OWN_DICT.sub(r"\1.\2", text)
    if "G[" in text:
        text = _IMPORTED.sub(lambda match: match[1].replace("_dot_", "."), text)
        text = _GLOBAL.sub(r"\1", _BUILTINS.sub(r"\1", text))
    if "L[" not in text:
        return text
    for prefix, value in scope.constants.items():
        if prefix.startswith("L[") and not isinstance(value, _Cell):
            text = text.replace(prefix, "self" if prefix == scope.self_prefix else prefix[3:-2])
    return _LOCAL.sub(r"\1", text)
