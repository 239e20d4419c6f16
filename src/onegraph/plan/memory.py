"""The memory of one call: which intermediate values have a place in it, and the places for each size.

Takes a plan and the pieces' callables. The places are worked out when a size is called for the second time, from the
sizes in bytes and from when each value begins and ends; the buffers, and all views of them, stay until other sizes push
them out. In the first call each piece allocates, since a prompt's length may never come again. All sizes share one
block of memory, as large as the largest of them.

What leaves the call has memory of its own: the plan's results, and what goes to code that may keep it (a splitting op
that isn't onegraph's, a piece that runs op by op, or one that returns or shows what it is given). Calls at the same
time, from several threads or from inside of a call, have a block each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from onegraph.ir.artifact import Layout, PieceCallable, PieceCode, PreparedPiece, SizeSource
from onegraph.ir.plan import ExecutionPlan, PlanCall

KEPT_SIZES = 64
"""So many sizes keep their places and views; the one whose last call is longest ago goes."""

_REMEMBERED_SIZES = 4096

ALIGNMENT = 64


@dataclass(frozen=True)
class PlacedResult:
    """A buffer that outputs of one call show: `names` are its values, the last of which `last_call` uses."""

    call: int
    result: int
    names: tuple[str, ...]
    last_call: int


@dataclass(frozen=True)
class MemoryPlan:
    """Which calls take their scratch from the block, by index, and which of their results have places there too.

    `checked` are calls that are given what wasn't made by a compiled piece, whose layout only looking at it tells.
    """

    prepared: dict[int, PreparedPiece]
    placed: tuple[PlacedResult, ...]
    checked: frozenset[int]


def plan_memory(plan: ExecutionPlan, pieces: Sequence[PieceCallable]) -> MemoryPlan:
    """What can have a place, for pieces that may be any callables."""
    prepared: dict[int, PreparedPiece] = {}
    for index, (call, piece) in enumerate(zip(plan.calls, pieces, strict=True)):
        found = piece.prepared if isinstance(piece, PieceCode) else None
        if found is not None and None not in sizes_of(plan, call, found):
            prepared[index] = found
    kept = {name for name in plan.results if isinstance(name, str)}
    last_use: dict[str, int] = {}
    unproven: set[str] = set()
    checked: set[int] = set()
    for index, (call, piece) in enumerate(zip(plan.calls, pieces, strict=True)):
        for position, name in enumerate(call.inputs):
            last_use[name] = index
            if not isinstance(piece, PieceCode) or position in piece.kept_inputs:
                kept.add(name)
        if unproven & set(call.inputs):
            checked.add(index)
        if not isinstance(piece, PieceCode):
            unproven |= set(call.outputs)
    results = (one for index, piece in prepared.items() for one in _results(plan.calls[index], index, piece, last_use))
    placed = tuple(one for one in results if one.names and not kept.intersection(one.names))
    return MemoryPlan(prepared, placed, frozenset(checked))


def _results(call: PlanCall, index: int, piece: PreparedPiece, last_use: dict[str, int]) -> Iterator[PlacedResult]:
    for number in range(len(piece.results)):
        names = tuple(name for name, shown in zip(call.outputs, piece.outputs, strict=True) if shown == number)
        yield PlacedResult(index, number, names, max((last_use.get(name, index) for name in names), default=index))


def places(buffers: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Offsets for buffers given as (bytes, first use, last use), in order of first use, and the bytes of all.

    Buffers in use at the same time don't overlap; each gets the lowest place that is free.
    """
    offsets: list[int] = []
    held: list[tuple[int, int, int]] = []  # offset, end, last use
    most = 0
    for size, first, last in buffers:
        held = [one for one in held if one[2] >= first]
        offset = 0
        for start, end, _ in sorted(held):
            if start - offset >= size:
                break
            offset = max(offset, end)
        end = offset + -(-size // ALIGNMENT) * ALIGNMENT
        held.append((offset, end, last))
        offsets.append(offset)
        most = max(most, end)
    return offsets, most


def num_bytes(layout: Layout) -> int:
    """What a buffer takes up."""
    size, stride, dtype = layout
    if 0 in size:
        return 0
    last = sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    return (last + 1) * int(dtype.itemsize)


@dataclass(frozen=True)
class Places:
    """Where everything lies for one choice of sizes: offsets in a block of `num_bytes`.

    Scratch of all pieces begins at 0, since one piece runs at a time; behind it lie results.
    """

    values: dict[int, tuple[int, ...]]
    """The sizes of each prepared call."""
    scratch: dict[tuple[PreparedPiece, tuple[int, ...]], list[tuple[int, Layout]]]
    results: list[tuple[PlacedResult, int, Layout]]
    num_bytes: int
    num_bytes_apart: int
    """What buffers of their own would take, one for each result and for each piece's scratch."""


def place(plan: ExecutionPlan, memory: MemoryPlan, sizes: Mapping[str, int]) -> Places:
    """The places for these values of the expressions in `size_names`."""
    prepared = memory.prepared
    values = {
        i: tuple(sizes[str(one)] for one in sizes_of(plan, plan.calls[i], piece)) for i, piece in prepared.items()
    }
    scratch: dict[tuple[PreparedPiece, tuple[int, ...]], list[tuple[int, Layout]]] = {}
    begin = apart = 0
    for index, piece in prepared.items():
        if (piece, values[index]) not in scratch:
            layouts = piece.scratch_layouts(*values[index])
            lengths = [num_bytes(one) for one in layouts]
            used = [(length, use.first, use.last) for length, use in zip(lengths, piece.scratch, strict=True)]
            offsets, most = places(used)
            scratch[piece, values[index]] = list(zip(offsets, layouts, strict=True))
            begin, apart = max(begin, most), apart + sum(lengths)
    results = memory.placed
    of_calls = {index: prepared[index].results_layouts(*values[index]) for index in {one.call for one in results}}
    layouts = [of_calls[one.call][one.result] for one in results]
    lengths = [num_bytes(one) for one in layouts]
    used = [(length, one.call, one.last_call) for length, one in zip(lengths, results, strict=True)]
    offsets, most = places(used)
    placed = [(one, begin + at, layout) for one, at, layout in zip(results, offsets, layouts, strict=True)]
    return Places(values, scratch, placed, begin + most, apart + sum(lengths))


@dataclass
class _Bound:
    """The callables of a plan for one region and size, and the pieces that they were made of."""

    made_of: list[PieceCallable]
    pieces: list[PieceCallable]


class Block:
    """The memory of one call at a time, with what was made of it for each size."""

    def __init__(self, plan: ExecutionPlan, regions: Sequence[list[PieceCallable]], names: tuple[str, ...]) -> None:
        self._plan = plan
        self._regions = regions
        self._names = names
        self._storage: torch.UntypedStorage | None = None
        self._bound: dict[tuple[int, ...], _Bound] = {}
        self._called: dict[tuple[int, ...], None] = {}
        self._memory: dict[int, tuple[list[PieceCallable], MemoryPlan]] = {}

    def pieces(self, region: int, *sizes: int) -> list[PieceCallable]:
        """The callables of the region's pieces, for these values of the sizes' names."""
        made_of, key = self._regions[region], (region, *sizes)
        bound = self._bound.pop(key, None)
        if bound is None or bound.made_of != made_of:  # a piece has fallen back since
            if key not in self._called:
                self._called[key] = None
                _forget_first(self._called, _REMEMBERED_SIZES)
                return made_of
            bound = self._bind(region, sizes)
            _forget_first(self._bound, KEPT_SIZES - 1)
        self._bound[key] = bound
        return bound.pieces

    def bound(self, region: int, *sizes: int) -> list[PieceCallable]:
        """As `pieces`, in their places from the first call on."""
        return self._bind(region, sizes).pieces

    @property
    def num_bytes(self) -> int:
        """What it takes now, for all sizes together."""
        return 0 if self._storage is None else int(self._storage.nbytes())

    def poison(self) -> None:
        """Overwrites the memory with bytes that are no number in any floating-point dtype."""
        if self._storage is not None:
            self._storage.fill_(0xFF)

    def _bind(self, region: int, sizes: tuple[int, ...]) -> _Bound:
        pieces = list(self._regions[region])
        made_of, memory = self._memory.get(region, (None, None))
        if memory is None or made_of != pieces:
            memory = plan_memory(self._plan, pieces)
            self._memory[region] = pieces, memory
        found = place(self._plan, memory, dict(zip(self._names, sizes, strict=True)))
        storage = self._storage_of(found.num_bytes)
        with torch.inference_mode(False), torch.no_grad():
            scratch = {
                (piece, values): piece.scratch_views([_tensor(storage, *one) for one in buffers], *values)
                for (piece, values), buffers in found.scratch.items()
            }
            results: dict[int, list[torch.Tensor | None]] = {
                index: [None] * len(piece.results) for index, piece in memory.prepared.items()
            }
            for result, offset, layout in found.results:
                results[result.call][result.result] = _tensor(storage, offset, layout)
            bound = list(pieces)
            for index, piece in memory.prepared.items():
                values = found.values[index]
                checks = index in memory.checked
                bound[index] = piece.bind(scratch[piece, values], results[index], values, checks)
        return _Bound(pieces, bound)

    def _storage_of(self, size: int) -> torch.UntypedStorage:
        """At least so many bytes. What was made of a smaller block is forgotten."""
        if self._storage is None or self._storage.nbytes() < size:
            self._bound.clear()
            self._storage = torch.UntypedStorage(size)
        return self._storage


def _forget_first(kept: dict[tuple[int, ...], Any], most: int) -> None:
    while len(kept) > most:
        del kept[next(iter(kept))]


def _tensor(storage: torch.UntypedStorage, offset: int, layout: Layout) -> torch.Tensor:
    size, stride, dtype = layout
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset // dtype.itemsize, size, stride)


@dataclass
class StepMemory:
    """Blocks for calls of one plan. A call takes one and gives it back; one that raises doesn't, and it is freed."""

    new: Callable[[], Block]
    free: list[Block] = field(default_factory=list)

    def take(self) -> Block:
        """A block that no other call has."""
        try:
            return self.free.pop()
        except IndexError:
            return self.new()

    def give(self, block: Block) -> None:
        """The next call may have the block."""
        self.free.append(block)


def size_names(plan: ExecutionPlan, regions: Sequence[Sequence[Any]]) -> tuple[str, ...] | None:
    """The plan's inputs from which the sizes of all buffers follow; None where no piece has buffers to plan."""
    plans = [plan_memory(plan, pieces) for pieces in regions]
    if not any(memory.placed or any(piece.scratch for piece in memory.prepared.values()) for memory in plans):
        return None
    calls = [(plan.calls[index], piece) for memory in plans for index, piece in memory.prepared.items()]
    return tuple(dict.fromkeys(str(size) for call, piece in calls for size in sizes_of(plan, call, piece)))


def sizes_of(plan: ExecutionPlan, call: PlanCall, piece: PreparedPiece) -> list[str | None]:
    """The sizes of a piece, as expressions over the plan's inputs; None for one that only a piece's result shows."""
    return [_size_of(plan, call, source) for source in piece.sizes]


def _size_of(plan: ExecutionPlan, call: PlanCall, source: SizeSource) -> str | None:
    if source.input is None:
        return plan.symbols.get(source.asked)
    name = call.inputs[source.input]
    return call.sizes.get(f"{source.input}{source.asked}", f"{name}{source.asked}" if name in plan.inputs else None)
