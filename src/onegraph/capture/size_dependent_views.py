"""Results that are views at some sizes and copies at the others: a write into one of both is seen, or isn't, by size.

`x.t().contiguous()` shares memory with `x` where `x` has one row, `x[:, :4].contiguous()` where it has four columns.
Tracing takes such a result for a copy, and tells nobody. Takes a captured graph; gives conditions on its sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from onegraph.capture.constraints import holds_over
from onegraph.ir.fx_nodes import changed_arguments, storage_of, value_of
from onegraph.torch_compat import shapes
from onegraph.torch_compat.shapes import RawCondition

_MAY_COPY = frozenset({"contiguous", "reshape", "reshape_as", "flatten", "ravel"})
_PLACEHOLDERS = ("placeholder", "get_attr")
_CHANNELS = {torch.channels_last: (0, 2, 3, 1), torch.channels_last_3d: (0, 2, 3, 4, 1)}

Ranges = Mapping[str, tuple[int, int]]


def size_dependent_views(graph_module: torch.fx.GraphModule, ranges: Ranges) -> list[RawCondition]:
    """That results which tracing took for copies are none of the views that they may be, where that shows: memory is
    written to, and what may be a view of it is read after that, by the graph or by the caller.

    `ranges` are those of torch's symbols for declared sizes, by their names.
    """
    found = []
    for path in _shown_paths(list(graph_module.graph.nodes)):
        is_view = sympy.And(*(_is_view(node, ranges) for node in path))
        if is_view is not sympy.false:
            place = shapes.user_line(path[-1].meta.get("stack_trace"))
            found.append(RawCondition(sympy.simplify_logic(sympy.Not(is_view)), place, None))
    return found


Path = tuple[Node, ...]


def _shown_paths(nodes: list[Node]) -> list[Path]:
    """The runs of calls that may copy, between memory that is written to and memory that is read after the write."""
    made_from: dict[int, tuple[int, Node]] = {}
    writes: list[dict[int, Path]] = []
    shown: dict[Path, None] = {}
    for node in nodes:
        read = {storage_of(one) for one in node.all_input_nodes}
        for related in writes:
            shown.update((path, None) for storage, path in related.items() if storage in read)
        for changed in map(storage_of, changed_arguments(node)):
            writes += [related] if (related := _related(changed, made_from)) else []
        source, result = _source(node), storage_of(node)
        before = None if source is None else storage_of(source)
        if before is not None and result is not None and before != result:
            made_from[result] = before, node
    held = {storage_of(node) for node in nodes if node.op in _PLACEHOLDERS}
    for related in writes:
        shown.update((path, None) for storage, path in related.items() if storage in held)
    return list(shown)


def _related(storage: int | None, made_from: Mapping[int, tuple[int, Node]]) -> dict[int, Path]:
    """The other storages that may be the same memory, each with the calls in between."""
    mine = _ancestry(storage, made_from)
    found: dict[int, Path] = {}
    for other in {*made_from, *(before for before, _ in made_from.values())} - {storage}:
        theirs = _ancestry(other, made_from)
        if mine[-1] == theirs[-1]:
            between = {*mine} ^ {*theirs}
            found[other] = tuple(node for result, (_, node) in made_from.items() if result in between)
    return found


def _ancestry(storage: int | None, made_from: Mapping[int, tuple[int, Node]]) -> list[int | None]:
    """The storage, the one that it was made from, and so on to the first."""
    chain = [storage]
    while (made := made_from.get(chain[-1])) is not None:  # type: ignore[arg-type]
        chain.append(made[0])
    return chain


def _source(node: Node) -> Node | None:
    """What a call that may copy is given; None for any other call."""
    if _name(node) not in _MAY_COPY:
        return None
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, Node) else None


def _name(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", "")) if node.op == "call_function" else ""


def _is_view(node: Node, ranges: Ranges) -> Any:
    """When the result is a view, as a condition on symbols.

    Method: PyTorch's own (`computeStride`). `reshape` needs each run of dims that it merges to be evenly spaced, but
    for dims of size 1. `contiguous` needs that of all dims, down to a step of 1.
    """
    source, result = value_of(node.args[0] if node.args else node.kwargs["input"]), value_of(node)
    size, stride, target = (
        [_expression(n, ranges) for n in each] for each in (source.shape, source.stride(), result.shape)
    )
    if _name(node) == "contiguous":
        order = _CHANNELS.get(node.kwargs.get("memory_format", torch.contiguous_format), range(len(size)))
        return _evenly_spaced(
            [size[i] for i in order] + [sympy.Integer(2)], [stride[i] for i in order] + [_HALF], ranges
        )
    runs = _merged_runs(size, target)
    return sympy.And(*(_evenly_spaced(size[a:b], stride[a:b], ranges) for a, b in runs))


_HALF = sympy.Rational(1, 2)
"""The step of a dim of size 2 behind the last one, which makes that one's step 1."""


def _evenly_spaced(size: Sequence[Any], stride: Sequence[Any], ranges: Ranges) -> Any:
    """Whether the dims that aren't of size 1 can be merged: each steps over all of the next one."""
    pairs = []
    for left in range(len(size)):
        for right in range(left + 1, len(size)):
            between = [sympy.Not(_equal(one, 1, ranges)) for one in size[left + 1 : right]]
            single = [_equal(size[left], 1, ranges), _equal(size[right], 1, ranges)]
            pairs.append(sympy.Or(*single, *between, _equal(stride[left], stride[right] * size[right], ranges)))
    return sympy.And(*pairs)


def _equal(left: Any, right: Any, ranges: Ranges) -> Any:
    """The equation, or what it is for all sizes."""
    _, difference = sympy.expand(left - right).as_content_primitive()
    number, sizes = (-difference if difference.could_extract_minus_sign() else difference).as_coeff_Add()
    equation = sympy.Eq(sizes, -number)
    known = {symbol: ranges[str(symbol)] for symbol in equation.free_symbols if str(symbol) in ranges}
    if not known or len(known) < len(equation.free_symbols):
        return equation
    if holds_over(equation, known):
        return sympy.true
    return sympy.false if holds_over(sympy.Not(equation), known) else equation


def _merged_runs(size: Sequence[Any], target: Sequence[Any]) -> list[tuple[int, int]]:
    """The runs of dims of `size` that whole runs of `target` are made of; all dims where that can't be told."""
    symbols = sorted({symbol for one in (*size, *target) for symbol in one.free_symbols}, key=str)
    samples = {symbol: sympy.prime(1000 + index) for index, symbol in enumerate(symbols)}
    runs, first, wanted = [], 0, iter(target)
    left = right = sympy.Integer(1)
    for index, one in enumerate(size):
        left *= one
        while right.subs(samples) < left.subs(samples) and (following := next(wanted, None)) is not None:
            right *= following
        if sympy.expand(left - right) == 0:
            runs.append((first, index + 1))
            first, left, right = index + 1, sympy.Integer(1), sympy.Integer(1)
    return runs if first == len(size) else [(0, len(size))]


def _expression(size: Any, ranges: Ranges) -> Any:
    """The size's expression. Strides of fresh memory hold `Max(1, n)`, which is `n` where that is never 0."""
    expression = shapes.expression(size, None)
    positive = {s for s in expression.free_symbols if ranges.get(str(s), (0, 0))[0] >= 1}
    return expression.replace(
        lambda part: (
            type(part).__name__ == "Max" and len(part.args) == 2 and part.args[0] == 1 and {part.args[1]} <= positive
        ),
        lambda part: part.args[1],
    )
