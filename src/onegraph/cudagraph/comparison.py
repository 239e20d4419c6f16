"""A replay against the plain call, to the bit: each one with `cudagraph_debug`, the first of what nobody asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from onegraph.counters import counters
from onegraph.cudagraph.graph import RecordedGraph
from onegraph.errors import RecordingError
from onegraph.ir.recording import RecordedSize
from onegraph.ops.memory import clone_together, same_bytes

_COMPARED = 1 << 26
"""Bytes of written memory that are put back and compared; a larger one, as a KV cache, is written twice."""


@dataclass(frozen=True)
class PlainCall:
    """What a plain call gave; `left` is what stood afterwards in `memory`, which it writes, put back since then."""

    results: tuple[Any, ...]
    names: tuple[str, ...]
    memory: tuple[torch.Tensor, ...]
    left: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, graph: RecordedGraph, inputs: Sequence[Any]) -> PlainCall:
        """Runs the plan's function."""
        memory = written(graph, inputs)
        if sum(one.nbytes for one in memory) > _COMPARED:
            counters.add("written_memory_not_compared")
            return cls(_cloned(graph.run(*inputs)), (), (), ())
        named = zip(graph.plan.inputs, graph.names, strict=True)
        names = tuple(name for place, name in named if place in graph.plan.written)
        with restored(memory):
            results = _cloned(graph.run(*inputs))
            left = clone_together(memory)
        return cls(results, names, tuple(memory), tuple(left))

    def compare(self, replayed: Sequence[Any], shown: RecordedSize) -> None:
        """Raises RecordingError where a replay's results, or what it has written, are others."""
        outputs = [f"output {index}" for index in range(len(replayed))]
        pairs = [*zip(outputs, self.results, replayed, strict=True)]
        pairs += [*zip(self.names, self.left, self.memory, strict=True)]
        for name, expected, found in pairs:
            if isinstance(expected, torch.Tensor) and not same_bytes(expected, found):
                raise RecordingError(
                    f"{name} after a replay ({shown.mode.name} at {shown.num_tokens}) isn't what the same call gives "
                    "without the recording",
                    where="a replay that was compared",
                    hint="cudagraph_mode=PIECEWISE, and `compiled.fallback(piece)`, narrow it down to a piece",
                    tensor=name,
                )


def written(graph: RecordedGraph, inputs: Sequence[Any]) -> list[torch.Tensor]:
    """Those of the plan's inputs that the graph changes."""
    plan = graph.plan
    return [one for name, one in zip(plan.inputs, inputs, strict=True) if name in plan.written]


@contextmanager
def restored(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Puts back the values of the tensors."""
    before = clone_together(tensors)
    try:
        yield
    finally:
        for tensor, values in zip(tensors, before, strict=True):
            tensor.copy_(values)


def _cloned(results: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in results)
