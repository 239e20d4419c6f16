"""What a build hands to the compiled model: the entry, how it came about, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onegraph.config.compilation import CUDAGraphMode
from onegraph.cudagraph.recordings import Recordings
from onegraph.explanation import Explanation
from onegraph.ir.ledger import StateEntry
from onegraph.ir.recording import RecordedSize, RecordingPlan
from onegraph.numerics.oracle import SizeCheck
from onegraph.step_timing import CompiledGraph

Changes = tuple[tuple[StateEntry, str], ...]
"""Facts of captured state that don't hold, each with what stands there now."""


@dataclass(frozen=True)
class SizedCall:
    """A call at one size of its only declared dim: an example's rows, repeated or cut.

    `tensors` are the arguments that have the dim, by their paths.
    """

    size: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]


Planned = Callable[
    [tuple[Any, ...], dict[str, Any], Callable[[SizedCall], RecordedSize | None]],
    tuple[RecordingPlan, Iterator[SizedCall]],
]


@dataclass(frozen=True)
class Built:
    """What a build gives: `entry` takes the module's own arguments; `explanation` tells how it came about.

    `holds` is the check of the captured Python state, or None where there is nothing to check; `changes` names
    the entries that don't hold, each with what stands there now.
    """

    entry: Callable[..., Any]
    explanation: Explanation
    holds: Callable[[], bool] | None = None
    changes: Callable[[], Changes] = tuple
    check: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], int], Iterator[SizeCheck]] | None = None
    """`check(compiled, args, kwargs, num_sizes)` compares with eager and fp64; None where nothing is compiled."""
    fallback: Callable[[int, str, int | None], Built] | None = None
    """`fallback(piece, why, size)` has a piece run op by op, for all sizes if `size` is None, else where it has that
    size's artifact, and gives this build with its new explanation."""
    failed_piece: Callable[[BaseException], int | None] = lambda error: None
    """The piece that an error was raised in."""
    slots: Callable[[int, Mapping[str, int]], dict[str, torch.Tensor]] | None = None
    """`slots(size, others)` allocates inputs of these sizes."""
    save: Callable[[Path], None] | None = None
    """Writes the build to a file; None where nothing is compiled."""
    recordings: tuple[Recordings, ...] = ()
    """Those of each region; none where nothing may be recorded."""
    graphs: tuple[CompiledGraph, ...] = ()
    """What runs each region, for who wants to time it; none where nothing is compiled."""
    recorded_as: CUDAGraphMode = CUDAGraphMode.NONE
    """How `warm_up` records."""
    planned: Planned | None = None
    """`planned(args, kwargs, record)` gives what `warm_up` records, and its calls; it records the largest first."""
