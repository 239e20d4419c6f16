"""Torch's symbolic shapes, read only: the conditions on symbols that tracing and compiling came to rely on."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._sympy import functions as sympy_functions
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from onegraph.ir.fx_nodes import value_of


@dataclass(frozen=True)
class RawCondition:
    """A boolean sympy expression over torch's symbols, and where it was made."""

    expr: Any
    user: str | None
    framework: str | None


def conditions(shape_env: Any) -> list[RawCondition]:
    """All four sources: guards, deferred runtime asserts, replacements, and narrowed ranges."""
    return [*_guards(shape_env), *_deferred(shape_env), *_replacements(shape_env), *_ranges(shape_env)]


def declared_symbols(error: GuardOnDataDependentSymNode) -> dict[str, str]:
    """Symbol -> name given to `mark_dynamic_dim`, in the trace that raised the error."""
    found: dict[str, str] = getattr(error, "declared_symbols", {})
    return found


def is_condition(expression: Any) -> bool:
    """Whether the expression over symbols is true or false, rather than a number."""
    return isinstance(expression, sympy.logic.boolalg.Boolean) and not expression.is_Symbol


@contextmanager
def inferred_strides() -> Iterator[None]:
    """A stride that isn't the product of a size and another stride is a constant: of a slice, such as `qkv[:, :4]`.

    Torch would make it a symbol that no argument of the graph gives.
    """
    original = ShapeEnv._compute_symbolic_stride
    names = list(inspect.signature(original).parameters)

    def inferred(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(**dict(zip(names, (self, *args), strict=False)) | kwargs | {"are_sizes_static": True})

    ShapeEnv._compute_symbolic_stride = inferred  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShapeEnv._compute_symbolic_stride = original  # type: ignore[method-assign]


@contextmanager
def asserted_while_tracing() -> Iterator[list[RawCondition]]:
    """Collects the conditions that tracing asserts or guards on, each with the user's line that was being traced.

    The shape environment keeps the conditions without that line. An error for a condition that can't be decided gets
    the names of the symbols that were given to `mark_dynamic_dim`, for `declared_symbols`.
    """
    found: list[RawCondition] = []
    original, evaluate = ShapeEnv.guard_or_defer_runtime_assert, ShapeEnv.evaluate_expr

    def noted(self: Any, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(orig_expr, "free_symbols", None):
            note([orig_expr])
        return original(self, orig_expr, *args, **kwargs)

    def evaluated(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = len(self.guards)
        try:
            result = evaluate(self, *args, **kwargs)
        except GuardOnDataDependentSymNode as error:
            names = {str(symbol): name for name, symbol in self._shape_id_to_unbacked_symbol.items()}
            error.declared_symbols = names  # type: ignore[attr-defined]
            raise
        if len(self.guards) > known:
            note([guard.expr for guard in self.guards[known:]])
        return result

    def note(expressions: list[Any]) -> None:
        frames = [f for f in TracingContext.extract_stack() if not is_torch_file(f.filename)]
        if frames:
            place = f"{frames[-1].filename}:{frames[-1].lineno}"
            found.extend(RawCondition(expression, place, None) for expression in expressions)

    ShapeEnv.guard_or_defer_runtime_assert = noted  # type: ignore[method-assign]
    ShapeEnv.evaluate_expr = evaluated  # type: ignore[method-assign]
    try:
        yield found
    finally:
        ShapeEnv.guard_or_defer_runtime_assert = original  # type: ignore[method-assign]
        ShapeEnv.evaluate_expr = evaluate  # type: ignore[method-assign]


def _guards(shape_env: Any) -> Iterator[RawCondition]:
    for guard in shape_env.guards:
        location = guard.sloc.framework_loc
        framework = None
        if location is not None:
            framework = location if isinstance(location, str) else f"{location.filename}:{location.lineno}"
        yield RawCondition(guard.expr, guard.sloc.maybe_user_loc, framework)


def _deferred(shape_env: Any) -> Iterator[RawCondition]:
    for asserts in shape_env.deferred_runtime_asserts.values():
        for item in asserts:
            frames = [f for f in item.stack.summary() if not is_torch_file(f.filename)] if item.stack else []
            user = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
            yield RawCondition(item.expr, user, None)


def _replacements(shape_env: Any) -> Iterator[RawCondition]:
    for symbol, expr in shape_env.replacements.items():
        yield RawCondition(sympy.Eq(symbol, expr, evaluate=False), None, None)


def _ranges(shape_env: Any) -> Iterator[RawCondition]:
    for symbol, value_range in shape_env.var_to_range.items():
        if value_range.lower.is_finite:
            yield RawCondition(sympy.Ge(symbol, value_range.lower, evaluate=False), None, None)
        if value_range.upper.is_finite:
            yield RawCondition(sympy.Le(symbol, value_range.upper, evaluate=False), None, None)


def size_functions() -> dict[str, Any]:
    """Torch's functions of sizes by the names that sympy prints; of numbers they give what tracing would compute."""
    return {
        name: one
        for name, one in vars(sympy_functions).items()
        if isinstance(one, type) and issubclass(one, sympy.Basic)
    }


def is_torch_file(filename: str) -> bool:
    """Whether a traceback's file belongs to torch, so that it isn't the user's line."""
    return "/torch/" in filename or filename.startswith("<")


def user_line(stack_trace: str | None) -> str | None:
    """The innermost frame of the user's code in a node's stack trace, as `file:line`."""
    places = re.findall(r'File "(.+?)", line (\d+)', stack_trace or "")
    users = [place for place in places if not is_torch_file(place[0])] or places
    return f"{users[-1][0]}:{users[-1][1]}" if users else None


def squeezed_sizes(graph_module: torch.fx.GraphModule) -> list[RawCondition]:
    """That no size which `squeeze` meets is 1: tracing takes an unknown size for another, and tells nobody."""
    found = []
    for node in graph_module.graph.nodes:
        squeezed = node.args[0] if _is_squeeze(node) and node.args else node.kwargs.get("input")
        tensor = value_of(squeezed) if _is_squeeze(node) and isinstance(squeezed, torch.fx.Node) else None
        if not isinstance(tensor, torch.Tensor):
            continue
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", range(tensor.dim()))
        for dim in [dims] if isinstance(dims, int) else dims:
            size = tensor.shape[dim] if tensor.dim() else 1
            if isinstance(size, torch.SymInt):
                expr = sympy.Ne(size.node.expr, 1, evaluate=False)
                found.append(RawCondition(expr, user_line(node.meta.get("stack_trace")), None))
    return found


def _is_squeeze(node: torch.fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("squeeze", "squeeze_")
    packet = getattr(node.target, "overloadpacket", None)
    return node.op == "call_function" and (node.target is torch.squeeze or packet is torch.ops.aten.squeeze)


def proven_by_ranges(expr: Any, ranges: Mapping[Any, tuple[int, int]]) -> bool:
    """Whether interval arithmetic proves the condition for all symbols in their ranges."""
    try:
        bound = bound_sympy(expr, {symbol: ValueRanges(lo, hi) for symbol, (lo, hi) in ranges.items()})
    except Exception:  # noqa: BLE001 - an operator without a range rule proves nothing
        return False
    return bool(bound.is_singleton() and bound.lower == sympy.true)


def expression(size: Any, shape_env: Any) -> Any:
    """The sympy expression of a size, with replacements applied; ints become sympy integers."""
    if isinstance(size, torch.SymInt):
        return size.node.expr if shape_env is None else shape_env.replace(size.node.expr)
    return sympy.Integer(size)


def symbol_names(value: Any) -> set[str]:
    """The names of the symbols that a symbolic value is made of, before replacement; none for a constant."""
    if is_symbolic(value):
        return {str(s) for s in value.node._expr.free_symbols}
    return set()


def symbols_of(values: Iterable[Any], shape_env: Any) -> set[str]:
    """The names of the symbols in tensors' sizes and strides, and in sizes, after replacement."""
    lengths = [n for value in values for n in (_lengths(value) if isinstance(value, torch.Tensor) else [value])]
    exprs = [
        expression(n, shape_env) if isinstance(n, torch.SymInt) else n.node.expr for n in lengths if is_symbolic(n)
    ]
    return {str(symbol) for expr in exprs for symbol in expr.free_symbols}


def _lengths(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (*tensor.shape, *tensor.stride()) if tensor.layout == torch.strided else tuple(tensor.shape)


def dense_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The dims from the largest stride to the smallest, if the tensor has no gaps in that order whatever its sizes."""
    sizes, strides = [expression(n, None) for n in tensor.shape], [expression(n, None) for n in tensor.stride()]
    left, order, step = set(range(tensor.dim())), list[int](), sympy.Integer(1)
    while left:
        fits = [dim for dim in left if sizes[dim] == 1 or _same_size(strides[dim], step)]
        if not fits:
            return None
        dim = max(fits, key=lambda dim: (sizes[dim] == 1, dim))
        left.remove(dim)
        order.append(dim)
        step *= sizes[dim]
    return tuple(reversed(order))


def _same_size(stride: Any, step: Any) -> bool:
    """Equal for all sizes from 1 on: for a size of 0 torch computes strides as for 1."""
    without = stride.replace(lambda e: isinstance(e, sympy.Max | sympy_functions.Max), _without_one)
    return bool(sympy.expand(without - step) == 0)


def _without_one(maximum: Any) -> Any:
    others = [one for one in maximum.args if one != 1]
    return others[0] if len(others) == 1 else maximum


def is_plain_symbol(value: Any) -> bool:
    """Whether the value is one symbol, and no expression of symbols."""
    return isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol)


def tracked_fakes(shape_env: Any) -> dict[str, Any]:
    """Dynamo's source name -> fake of every tensor that the trace has looked at, also of those not in its graph."""
    return {tracked.source.name: tracked.fake for tracked in shape_env.tracked_fakes or ()}


def is_assertion(node: torch.fx.Node) -> bool:
    """Whether the node asserts a condition on sizes at run time; the condition is its first argument."""
    return node.target is torch.ops.aten._assert_scalar.default


def is_symbolic(value: Any) -> bool:
    """Whether the value is a size, float or bool that torch traces as a symbol."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def backed_inputs(fake_inputs: Iterable[Any]) -> list[Any]:
    """The size inputs of a graph that torch guards on: those whose symbol has a value from the traced call."""
    return [value for value in fake_inputs if isinstance(value, torch.SymInt) and value.node.has_hint()]


def guards_expression(shape_env: Any, symbolic_inputs: list[Any]) -> str | None:
    """The guards on the given SymInts as text that `holds` can evaluate in another process; None for none."""
    if not symbolic_inputs:
        return None
    guards = shape_env.get_pruned_guards(symbolic_inputs)
    text: str | None = shape_env.produce_guards_expression(placeholders=symbolic_inputs, guards=guards)
    return text


def holds(shape_env: Any, guards: str, symbolic_inputs: list[Any]) -> bool:
    """Evaluates such a text; what it relies on becomes guards of the current trace."""
    return bool(shape_env.evaluate_guards_expression(guards, symbolic_inputs))
