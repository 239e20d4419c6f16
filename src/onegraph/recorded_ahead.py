"""What `warm_up` records: at which sizes, chosen by what was asked for, by traffic, or by a budget of memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from onegraph.built import Built, SizedCall
from onegraph.config.compilation import CUDAGraphMode
from onegraph.config.resolve import ResolvedConfig
from onegraph.cudagraph.sizes import SizeChoice
from onegraph.errors import ConfigError
from onegraph.ir.recording import RecordedSize, RecordingPlan, between


def recorded_ahead(module: Any, built: Built, dynamic_shapes: Any, resolved: ResolvedConfig) -> dict[str, Any]:
    """Fields of the build: how and at which sizes `warm_up` records. Raises ConfigError for sizes that it can't."""
    dims, asked, lazy = built.explanation.dims, resolved.cudagraph_capture_sizes, resolved.cudagraph_lazy
    mode = CUDAGraphMode.PIECEWISE if resolved.cudagraph_mode is CUDAGraphMode.PIECEWISE else CUDAGraphMode.FULL
    if not built.recordings:
        return {}
    if len(dims) != 1 and (asked or lazy):
        what = f"cudagraph_capture_sizes={list(asked)}" if asked else "cudagraph_lazy"
        raise ConfigError(
            f"{what} is about the sizes of one dynamic dim, and there are {len(dims)}",
            where="recordings",
            hint="leave it out: warm_up records a call without dynamic dims, and record() one with several",
        )
    if len(dims) > 1:
        return {}
    padding = [recordings.padding for recordings in built.recordings]
    pads = all(one is not None and one.why_not is None for one in padding)
    choice = SizeChoice.of(resolved.to_dict(), pads=pads)
    if not dims and (choice.traffic or choice.needs_estimate):
        raise ConfigError(
            "cudagraph_traffic and cudagraph_memory_mib choose among sizes of a dynamic dim, and there is none",
            where="recordings",
            hint="leave them out: warm_up records the call as it is",
        )
    sizes = choice.sizes(dims[0].min, dims[0].max) if dims and not choice.needs_estimate else ()
    if lazy and choice.needs_estimate:
        raise ConfigError(
            "cudagraph_memory_mib can't be kept by cudagraph_lazy: what a recording takes is asked of a call",
            where="recordings",
            hint="leave one of the two out",
        )
    if lazy and not sizes:
        raise ConfigError(
            f"cudagraph_lazy records sizes when they first come, and of those in {dims[0].min}..{dims[0].max} none is "
            "recorded by itself",
            where="recordings",
            hint="give cudagraph_capture_sizes",
        )
    if lazy:
        for recordings in built.recordings:
            recordings.record_lazily(mode, sizes)
        return {}

    def planned(
        args: tuple[Any, ...], kwargs: dict[str, Any], record: Callable[[SizedCall], RecordedSize | None]
    ) -> tuple[RecordingPlan, Iterator[SizedCall]]:
        from onegraph.size_check import sized_calls  # this, and what it needs, is rarely used

        calls = functools.partial(
            sized_calls, module, args, kwargs, dynamic_shapes=dynamic_shapes, max_size=resolved.max_num_tokens
        )
        if not dims:
            every = list(calls(sizes=()))
            return RecordingPlan({mode: ()}, "it has no dynamic dims", None, record(every[0])), iter(every)
        (dim,) = dims
        candidates = replace(choice, budget_bytes=None).sizes(dim.min, dim.max)
        first = None
        for largest in calls(sizes=candidates[-1:]):
            first = record(largest)
        chosen = choice.sizes(dim.min, dim.max, 0.0 if first is None else first.bytes_per_row)
        without = between(chosen, dim)
        if pads:
            without = without[-1:] if without and without[-1].last == dim.max else ()
        plan = RecordingPlan({mode: chosen}, str(choice), None, first, without, choice.traffic, pads)
        return plan, calls(sizes=chosen)

    return {"recorded_as": mode, "planned": planned}
