"""Recordings: what a device was told to do once, done again without the code that told it.

A recording has fixed memory: it reads and writes the tensors that it was recorded with, where they lay then. Code of
the host (Python, `.item()`, a branch on a value) isn't run again, and a tensor that is passed later isn't seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RecordedStep:
    """One thing that a replay has the device do: a kernel, or an operator. `num_bytes` is new memory that it keeps."""

    name: str
    num_bytes: int = 0


class NotRecordableError(Exception):
    """What a function did that a recording can't repeat.

    `code` is a reason code (`host_read`, `random`, `host_code`, `unsafe_op`, …), `op` what did it, `why` in words.
    """

    def __init__(self, code: str, op: str, why: str) -> None:
        super().__init__(f"{op} {why}")
        self.code = code
        self.op = op
        self.why = why


class Recording(Protocol):
    """Work that can be done again, on the same memory."""

    steps: tuple[RecordedStep, ...]
    """In the order in which a replay does them; empty where a device doesn't tell."""
    num_bytes: int
    """Memory that it holds for itself, beside what it was recorded with."""

    def replay(self) -> None:
        """Does the work again, in the caller's thread."""
        ...


class Recorder(Protocol):
    """Makes recordings of one compiled model, which share memory: one is replayed at a time."""

    def record(self, run: Callable[[], Any], inputs: Sequence[torch.Tensor]) -> tuple[Recording, Any]:
        """Calls `run` once, which works on `inputs` and on memory that it makes; gives what it returned, too.

        The recording keeps alive what `run` made, and what it returned, and not the inputs: whoever replays has to know
        that they are there. Tensors in what was returned show the recording's memory, until the next replay.
        Raises NotRecordableError, and what `run` raises; then nothing is kept.
        """
        ...
