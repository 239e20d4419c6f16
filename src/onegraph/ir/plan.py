"""ExecutionPlan: the calls of one compiled graph with the values that go in and out, and when each value ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PlanCall:
    """One piece's call: `inputs` and `outputs` are names of values, `frees` those that nobody uses afterwards."""

    piece: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    frees: tuple[str, ...]
    comment: str = ""
    sizes: Mapping[str, str] = field(default_factory=dict)
    """What the inputs show of sizes that follow from the plan's inputs: `2.shape[0]` -> an expression over those."""
    has_data_sizes: bool = False
    """Whether an input has a size that follows from values, such as how many of them aren't zero."""


@dataclass(frozen=True)
class ExecutionPlan:
    """`inputs` are the graph's placeholders in order (weights, sizes, tensors), with the merged weights after the
    weights; `results` its outputs.

    A result is the name of a value, or a constant that isn't a string. `size` is an expression over the inputs for
    the size of the first declared dim; None where there is no such dim.
    """

    inputs: tuple[str, ...]
    calls: tuple[PlanCall, ...]
    results: tuple[Any, ...]
    size: str | None = None
    symbols: Mapping[str, str] = field(default_factory=dict)
    """Symbol of a size (`u0`) -> an expression over the inputs for it."""
    written: frozenset[str] = frozenset()
    """The inputs whose memory the graph changes, or may change."""
    result_lengths: tuple[tuple[str, ...], ...] = ()
    """How long each result is in each of its dims, as expressions over the inputs; of a size its value."""


@dataclass(frozen=True)
class PlannedBuffer:
    """Memory that is reused from call to call: the values that it holds, or a buffer inside of a piece's call.

    `layout` is size, stride and dtype, with sizes as expressions over the plan's inputs; `first` and `last` are the
    pieces between which it is used; `offset` is its place in the block, at the plan's example sizes.
    """

    names: tuple[str, ...]
    layout: str
    first: int
    last: int
    num_bytes: int
    offset: int


@dataclass(frozen=True)
class BufferPlan:
    """The block of memory of one call: what lies where at example sizes, which are the largest that are declared.

    `num_bytes` is the block's length there; `num_bytes_apart` what its buffers would take beside each other.
    """

    sizes: Mapping[str, int]
    buffers: tuple[PlannedBuffer, ...]
    num_bytes: int
    num_bytes_apart: int
