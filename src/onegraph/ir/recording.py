"""Recordings: what a device was told to do once, done again without the code that told it.

A recording has fixed memory: it reads and writes the tensors that it was recorded with, where they lay then. Code of
the host (Python, `.item()`, a branch on a value) isn't run again, and a tensor that is passed later isn't seen.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from onegraph.config.compilation import CUDAGraphMode
from onegraph.ir.dims import DynamicDim

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RecordedStep:
    """One thing that a replay has the device do: a kernel, or an operator. `num_bytes` is new memory that it keeps."""

    name: str
    num_bytes: int = 0


@dataclass(frozen=True)
class RecordedSize:
    """A recording of a compiled graph, for people.

    `num_tokens` is the size of the first declared dim; `num_bytes` is what the recording added to the memory of those
    before it, which it shares; `unrecorded` are pieces that run as ever, and why.
    """

    num_tokens: int | None
    mode: CUDAGraphMode
    num_steps: int
    num_bytes: int
    seconds: float
    unrecorded: Mapping[int, str]

    @property
    def bytes_per_row(self) -> float:
        return self.num_bytes / (self.num_tokens or 1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_tokens": self.num_tokens,
            "mode": self.mode.name,
            "steps": self.num_steps,
            "bytes": self.num_bytes,
            "seconds": round(self.seconds, 4),
            "unrecorded": [{"piece": piece, "why": why} for piece, why in self.unrecorded.items()],
        }


@dataclass(frozen=True)
class Uncovered:
    """Sizes `first..last` (None: no end) of the first declared dim that aren't recorded, and why."""

    first: int
    last: int | None
    why: str

    def to_dict(self) -> dict[str, Any]:
        return {"range": [self.first, self.last], "why": self.why}

    def __str__(self) -> str:
        sizes = f"{self.first}" if self.first == self.last else f"{self.first}..{self.last or ''}"
        return f"{sizes}: {self.why}"


def uncovered(recorded: Iterable[RecordedSize], dim: DynamicDim) -> tuple[Uncovered, ...]:
    """The sizes of the first dim between those that are recorded."""
    return between((one.num_tokens for one in recorded if one.num_tokens is not None), dim)


def between(recorded: Iterable[int], dim: DynamicDim) -> tuple[Uncovered, ...]:
    """As `uncovered`, of sizes."""
    sizes = set(recorded)
    edges = [dim.min - 1, *sorted(sizes), dim.max + 1]
    return tuple(
        Uncovered(before + 1, after - 1, "no recording of this size")
        for before, after in itertools.pairwise(edges)
        if after - before > 1
    )


@dataclass(frozen=True)
class RecordingPlan:
    """What will be recorded, before it is.

    `sizes` are those of each mode, `chosen` says how they came about. With `lazily_at` each is recorded when it comes
    for so many times. `first` is the recording of the largest, which is made first, and tells what others will cost.
    `traffic` are calls by size, if any are known. `pads` says whether calls run at the next larger size.
    """

    sizes: Mapping[CUDAGraphMode, tuple[int, ...]]
    chosen: str
    lazily_at: int | None
    first: RecordedSize | None = None
    uncovered: tuple[Uncovered, ...] = ()
    traffic: Mapping[int, int] = field(default_factory=dict)
    pads: bool = True

    @property
    def num_bytes(self) -> int | None:
        """About as much as all recordings hold, or less, since they share memory."""
        if self.first is None:
            return None
        rows = sum(sum(sizes) for sizes in self.sizes.values()) if self.first.num_tokens else 1
        return int(rows * self.first.bytes_per_row)

    @property
    def seconds(self) -> float | None:
        """About as long as recording takes, or less, since smaller calls are faster."""
        if self.first is None:
            return None
        return sum(len(sizes) or 1 for sizes in self.sizes.values()) * self.first.seconds

    def to_dict(self) -> dict[str, Any]:
        return {
            "sizes": {mode.name: list(sizes) for mode, sizes in self.sizes.items()},
            "chosen": self.chosen,
            "lazily_at": self.lazily_at,
            "expected_bytes": self.num_bytes,
            "expected_seconds": None if self.seconds is None else round(self.seconds, 3),
            "padding": {mode.name: self._padding(sizes) for mode, sizes in self.sizes.items() if sizes and self.pads},
            "uncovered": [one.to_dict() for one in self.uncovered],
            "traffic": {str(size): count for size, count in sorted(self.traffic.items())},
        }

    def _padding(self, sizes: tuple[int, ...]) -> dict[str, Any]:
        share, size, padded = most_padding(sizes)
        of_traffic = padding_of(self.traffic, sizes) if self.traffic else None
        return {"most": round(share, 3), "at": size, "runs_as": padded, "of_traffic": of_traffic}

    def lines(self) -> list[str]:
        """A line for each mode, and one for each kind of call that isn't covered."""
        found = []
        for mode, sizes in self.sizes.items():
            if not sizes and self.first is None:
                found.append(f"{mode.name}: nothing, for no size that is recorded by itself is in range")
                continue
            at = f" at {_told(sizes)}" if sizes else ""
            told = f"{mode.name}{at} ({self.chosen})"
            if self.lazily_at is not None:
                time = "first comes" if self.lazily_at == 1 else f"comes for the {self.lazily_at}th time"
                told += f", each when it {time}"
            nothing: dict[str, Any] = {"at": 0, "runs_as": 0, "of_traffic": None}
            padding = self._padding(sizes) if sizes and self.pads else nothing
            if padding["at"] < padding["runs_as"]:
                told += f"; at most {padding['most']:.0%} padding: {padding['at']} runs as {padding['runs_as']}"
            if padding["of_traffic"] is not None:
                told += f", {padding['of_traffic']:.1%} with this traffic"
            found.append(told)
        if self.num_bytes is not None and self.seconds is not None:
            found.append(f"at most about {self.num_bytes / 2**20:.1f} MiB and {self.seconds:.1f} s")
        return [*found, *(f"not recorded: {one}" for one in self.uncovered)]


def _told(sizes: Sequence[int]) -> str:
    """The sizes, `1..16` for those that follow one another."""
    runs: list[list[int]] = []
    for size in sorted(sizes):
        if runs and size == runs[-1][-1] + 1:
            runs[-1].append(size)
        else:
            runs.append([size])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def most_padding(sizes: Sequence[int]) -> tuple[float, int, int]:
    """The largest share of padding in a call below the largest size: the share, the call's size, and the padded one."""
    gaps = itertools.pairwise((0, *sorted(sizes)))
    return max(((upto - after - 1) / upto, after + 1, upto) for after, upto in gaps)


def padding_of(traffic: Mapping[int, int], sizes: Sequence[int]) -> float:
    """The share of padding in all rows that calls of this traffic run with, at these recorded sizes."""
    ordered = sorted(sizes)
    rows = padded = 0
    for size, count in traffic.items():
        place = bisect.bisect_left(ordered, size)
        upto = ordered[place] if place < len(ordered) else size
        rows, padded = rows + count * upto, padded + count * (upto - size)
    return padded / rows if rows else 0.0


def recorded_lines(recorded: Sequence[RecordedSize]) -> list[str]:
    """A line for each way of recording, with sizes, memory and seconds."""
    lines = []
    for mode in dict.fromkeys(one.mode for one in recorded):
        ours = [one for one in recorded if one.mode is mode]
        sizes = _told([one.num_tokens for one in ours if one.num_tokens is not None])
        num_bytes, seconds = sum(one.num_bytes for one in ours), sum(one.seconds for one in ours)
        lines.append(
            f"{mode.name}{f' at {sizes}' if sizes else ''}: {max(one.num_steps for one in ours)} steps, "
            f"{num_bytes:,} bytes, {seconds:.2f} s"
        )
        left = {piece: why for one in ours for piece, why in one.unrecorded.items()}
        lines += [f"  {len(pieces)} pieces as ever, {why}" for why, pieces in _by_reason(left).items()]
    return lines


def _by_reason(left: Mapping[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for piece, why in left.items():
        found.setdefault(why, []).append(piece)
    return found


class NotRecordableError(Exception):
    """What a function did that a recording can't repeat.

    `code` is a reason code, `op` what did it, `why` in words. The codes of recorders:

    - `host_read`: Python is given a value that depends on a tensor's;
    - `data_dependent_shape`: a tensor's size depends on values;
    - `random`: random numbers are drawn, and a replay would draw the same;
    - `host_code`: code of the host is run, which a replay doesn't run: Python, or what is done on the CPU beside a GPU;
    - `unsafe_op`: an op is tagged `torch.Tag.cudagraph_unsafe`, or works on what isn't plain memory;
    - `moved_memory`: a tensor that was used before is given other memory;
    - `not_capturable`: the device refuses, in its own words.
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
    """Memory that was made while it was recorded, and that it holds."""

    def replay(self) -> None:
        """Does the work again, in the caller's thread, which needn't be the one that recorded.

        Raises RuntimeError for a kernel that refuses what it finds now. Numbers of threads are as they were recorded.
        """
        ...

    def poison(self) -> None:
        """Overwrites the memory that it made with bytes that are no number, as far as nobody else has a use for it."""
        ...


class Turn:
    """Whose turn it is to record or to replay, among threads and among the parts of a model that share memory."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.holder: int | None = None
        """The thread that has the lock."""


class Recorder(Protocol):
    """Makes recordings of one compiled model, which share memory: one is replayed at a time."""

    turn: Turn

    def record(self, run: Callable[[], Any], inputs: Sequence[torch.Tensor]) -> tuple[Recording, Any]:
        """Calls `run`, which works on `inputs` and on memory that it makes; gives what it returned, too.

        What `run` does on the device is done once, also by a recorder that has to call it twice. What else this
        thread's code does meanwhile is recorded with it; other threads' work isn't.

        The recording keeps alive what `run` made, what it returned, and what it used besides, and not the inputs:
        whoever replays has to know that they are there. Tensors in what was returned show the recording's memory, until
        the next replay. Raises NotRecordableError, also where `run` has caught it and gone on, and what `run` raises;
        then nothing is kept, and what has run has run.
        """
        ...
