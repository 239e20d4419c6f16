"""One call that was recorded: what a replay of it relies on, and how it is done."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from onegraph.cudagraph.call_memory import Kind
from onegraph.cudagraph.manifest import Manifest
from onegraph.cudagraph.pieces import ReplayedPiece
from onegraph.ir.recording import RecordedSize, Recording


@dataclass
class RecordedCall:
    """A recording that can be replayed: `replay(inputs)` does it, and gives the results in the recording's memory."""

    shown: RecordedSize
    replay: Callable[[tuple[Any, ...]], Sequence[Any]]
    manifest: Manifest
    statics: tuple[tuple[int, torch.Tensor, int], ...]
    """Step inputs: their index, the tensor that was recorded, and its address."""
    copies: bool
    """Whether step inputs that lie elsewhere may be copied in: not where a result shows their memory."""
    kinds: tuple[Kind, ...]
    pinned: list[int]
    """The inputs, by index, that it reads or writes where they lie."""
    addresses: list[int]
    """Of these."""
    num_weights: int
    """So many of them, the first, are weights."""
    made_by: Sequence[Recording | ReplayedPiece]
    """Its recordings, whose memory `poison` overwrites."""
    look: int | None = None
    """The look at the module whose weights were compared last."""
    proven: bool = False
    """Whether a replay has given what the plain call gives."""
    given: list[tuple[int, weakref.ref[torch.Tensor]]] = field(default_factory=list)


@dataclass(frozen=True)
class WholeReplay:
    """Replays one recording of the whole call."""

    recording: Recording
    results: Sequence[Any]

    def __call__(self, inputs: tuple[Any, ...]) -> Sequence[Any]:
        self.recording.replay()
        return self.results


@dataclass(frozen=True)
class PiecesReplay:
    """Runs a plan's function whose pieces are replayed."""

    function: Callable[..., Any]

    def __call__(self, inputs: tuple[Any, ...]) -> Sequence[Any]:
        found: Sequence[Any] = self.function(*inputs)
        return found
