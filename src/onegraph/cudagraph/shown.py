"""What `explain` shows of recordings: sizes, those that are padded, those without, memory, and inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from onegraph.cudagraph.padded_calls import next_sizes
from onegraph.cudagraph.recordings import Recordings
from onegraph.ir.dims import DynamicDim
from onegraph.ir.padding import PaddedSizes, StepInput
from onegraph.ir.recording import Uncovered, uncovered


def shown(recordings: Sequence[Recordings], dims: Sequence[DynamicDim]) -> dict[str, Any]:
    """Fields of an Explanation. The recordings are those of each region, `dims` the declared ones."""
    recorded = tuple(size for one in recordings for size in one.recorded())
    memory = dict.fromkeys(use for one in recordings for use in one.memory())
    # Where there are several regions, only between two sizes of one of them is it clear that calls belong there.
    least = dims[0].min if dims and len(recordings) == 1 else None
    padded = tuple(gap for one in recordings for gap in _padded(one, least))
    without = uncovered(recorded, dims[0]) if recordings and dims else ()
    why_not = [one.padding.why_not for one in recordings if one.padding is not None]
    if why_not and None not in why_not:
        without = tuple(replace(one, why=f"{one.why}, and not padded: {why_not[0]}") for one in without)
    return {
        "recorded": recorded,
        "uncovered": tuple(one for one in without if not _is_padded(one, padded)),
        "padded": padded,
        "recorded_memory": tuple(use.to_dict() for use in memory),
        "recorded_inputs": tuple(dict.fromkeys(given for one in recordings for given in _step_inputs(one))),
    }


def _padded(recordings: Recordings, least: int | None) -> Iterator[PaddedSizes]:
    """The sizes between those that are recorded, from `least` on, or else from the smallest that is recorded."""
    if recordings.padding is None or recordings.padding.why_not is not None:
        return
    recorded = recordings.recorded()
    sizes = sorted({one.num_tokens for one in recorded if one.num_tokens is not None})
    picks = next_sizes(recorded)
    for before, after in itertools.pairwise([*([] if least is None else [least - 1]), *sizes]):
        if after - before > 1:
            to = picks.decide(before + 1, is_uniform_decode=True)
            yield PaddedSizes(before + 1, after - 1, to.size, to.mode)


def _is_padded(one: Uncovered, padded: Sequence[PaddedSizes]) -> bool:
    return any(gap.first <= one.first and one.last is not None and one.last <= gap.last for gap in padded)


def _step_inputs(recordings: Recordings) -> Iterator[StepInput]:
    """The inputs that each call fills; those without declared dims once they are recorded."""
    graph, policies = recordings.graph, {} if recordings.padding is None else recordings.padding.policies
    sized, statics = {one.path: one for one in graph.arguments}, recordings.statics()
    for index, (name, owner) in enumerate(zip(graph.names, graph.owners, strict=True)):
        known = sized.get(name, statics.get(index)) if owner == "step input" else None
        if known is not None:
            dtype = str(known.dtype).removeprefix("torch.")
            yield StepInput(name, dtype, tuple(map(str, known.shape)), policies.get(name))
