"""Timers in the call of a compiled graph: around its pieces, their kernels, and replays of its recordings.

Takes the plan's function, the recordings before it, and where each piece's nodes come from; a clock. They are there
while somebody profiles, and nothing of them at any other time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from onegraph.compilers.timed_kernels import CallSite, call_sites, timed_kernels
from onegraph.cudagraph.recordings import Recordings
from onegraph.ir.artifact import LoadedPiece, PieceCode, PieceSource
from onegraph.ir.fx_nodes import module_range
from onegraph.ir.step_clock import KernelSite, Span, StepClock
from onegraph.ir.step_profile import REPLAY, NodeOrigin
from onegraph.plan.function import function_regions, timed_pieces

_WARM_UPS = 2
"""A size has its places in memory from the second call on."""


@dataclass(frozen=True)
class CompiledGraph:
    """What runs one captured graph. `origins` gives for each piece its nodes, in order."""

    run: Callable[..., Any]
    """The plan's function."""
    recordings: Recordings | None
    origins: Callable[[], Sequence[Sequence[NodeOrigin]]]


@contextmanager
def timed_graphs(graphs: Sequence[CompiledGraph], names: Sequence[str], clock: StepClock) -> Iterator[None]:
    """Inside, calls of these graphs are spans of the clock; `names` has those of the pieces, by their numbers.

    A replay, one call for all its kernels, is a span `replay` beside the steps; in the step stands the same call by the
    plan's function, with its pieces and kernels. It runs besides, so the graph must be right to run twice on one input:
    an engine's model writes the same into its KV cache once more.
    """
    with ExitStack() as timers:
        for graph in graphs:
            timers.enter_context(timed_pieces(graph.run, lambda piece: clock.enter(names[piece]), clock.leave))
            timers.enter_context(timed_kernels(_sources(graph), clock))
            if graph.recordings is not None:
                timers.enter_context(graph.recordings.watched(_Replays(graph.run, clock)))
        yield
    for graph in graphs:
        _attribute(graph, names, clock)


def _sources(graph: CompiledGraph) -> Iterable[PieceSource]:
    pieces = (piece for region in function_regions(graph.run) for piece in region)
    return [piece.source for piece in pieces if isinstance(piece, PieceCode | LoadedPiece) and piece.source is not None]


class _Replays:
    """Times replays, and has each call run by the plan as well."""

    def __init__(self, run: Callable[..., Any], clock: StepClock) -> None:
        self._run = run
        self._clock = clock
        self._known: set[tuple[Any, ...]] = set()

    def __call__(self, replay: Callable[[], Sequence[Any]], inputs: tuple[Any, ...]) -> Sequence[Any]:
        with self._clock.left_out():
            sizes = tuple(tuple(getattr(one, "shape", ())) for one in inputs)
            for _ in range(_WARM_UPS if sizes not in self._known else 0):
                self._run(*inputs)
            self._known.add(sizes)
        self._clock.stand_in(lambda: self._run(*inputs))
        with self._clock.aside(REPLAY):
            return replay()


def _attribute(graph: CompiledGraph, names: Sequence[str], clock: StepClock) -> None:
    """Has the spans of pieces and kernels know their nodes."""
    origins, numbers = graph.origins(), {name: number for number, name in enumerate(names)}
    sites_of = functools.cache(call_sites)
    for span in clock.top.all():
        number = numbers.get(span.name, len(origins))
        if number >= len(origins):
            continue
        own = origins[number]
        span.module_path = span.module_path or module_range(one.module_path for one in own)
        for kernel in span.inside.values():
            sites = sorted(kernel.sites, key=lambda site: site.number)
            _tell(kernel, [one for site in sites for one in _computed(site, sites_of(site.source), own)])
        if not span.inside:
            _tell(span, own)


def _computed(site: KernelSite, sites: Sequence[CallSite], own: Sequence[NodeOrigin]) -> Iterator[NodeOrigin]:
    """The nodes of a piece that a call of a kernel computes. The text may have been made of an equal piece."""
    if site.number >= len(sites) or sites[site.number].called != site.called:
        return
    by_name = {one.name: one for one in own}
    nodes = site.source.nodes
    if nodes is not None and len(nodes) == len(own):
        by_name = dict(zip(nodes, own, strict=True))
    for name in sites[site.number].nodes:
        yield by_name.get(name) or NodeOrigin(name, None, "")


def _tell(span: Span, origins: Sequence[NodeOrigin]) -> None:
    span.ops = tuple(dict.fromkeys(one.name for one in origins))
    span.user = next((one.user for one in reversed(origins) if one.user is not None), None)
    span.module_path = module_range(one.module_path for one in origins) or span.module_path
