"""StepProfile: where the time of an engine's steps went, as data, as text, and as a timeline for Perfetto.

Rows form a tree by their paths. A row's seconds include those of the rows below it; what they leave is its own time:
Python between kernels, in a piece's row.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

STEP, MODEL, PIECE, REPLAY = "step", "model", "piece ", "replay"
"""Names in paths: a step, the model's call in it, how those of pieces begin, and replays of recordings."""

_WIDEST = 72

Kind = Literal["decode", "prefill", "mixed"]


@dataclass(frozen=True)
class NodeOrigin:
    """A node of a piece's graph: its name, the user's `file:line` that called it, and the module whose code that is."""

    name: str
    user: str | None
    module_path: str


@dataclass(frozen=True)
class BatchKind:
    """A batch of `num_tokens` new tokens of `num_seqs` sequences."""

    num_tokens: int
    num_seqs: int
    kind: Kind


@dataclass(frozen=True)
class ProfileRow:
    """What has one path. `ops` are the FX nodes that a kernel computes."""

    path: tuple[str, ...]
    calls_per_step: float
    seconds_per_step: float
    ops: tuple[str, ...] = ()
    user: str | None = None
    module_path: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": list(self.path),
            "calls_per_step": round(self.calls_per_step, 4),
            "seconds_per_step": round(self.seconds_per_step, 9),
            "ops": list(self.ops),
            "user": self.user,
            "module_path": self.module_path,
        }


@dataclass(frozen=True)
class ProfileEvent:
    """One span of a row as it happened, in seconds since the profile began; replays stand on a line of their own."""

    row: int
    began_s: float
    seconds: float
    is_aside: bool


@dataclass(frozen=True)
class StepProfile:
    """`seconds_per_step` is what a step took, replays of recordings included, and timers.

    In the rows below `step`, batches that were replayed count as they take without their recordings; what the replays
    took instead is the row `replay` beside it. `notes` say so, and what else has to be known to read the figures.
    """

    num_steps: int
    batches: Mapping[BatchKind, int]
    seconds_per_step: float
    rows: tuple[ProfileRow, ...]
    notes: tuple[str, ...] = ()
    events: tuple[ProfileEvent, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the events."""
        return {
            "steps": self.num_steps,
            "batches": [
                {"num_tokens": one.num_tokens, "num_seqs": one.num_seqs, "kind": one.kind, "count": count}
                for one, count in self.batches.items()
            ],
            "seconds_per_step": round(self.seconds_per_step, 9),
            "rows": [row.to_dict() for row in self.rows],
            "notes": list(self.notes),
        }

    def perfetto(self) -> dict[str, Any]:
        """A Chrome trace of the single spans, which ui.perfetto.dev opens: replays are a second thread."""
        names = {1: "steps", 2: "replays of recordings"}
        heads = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": tid, "ts": 0, "args": {"name": name}}
            for tid, name in names.items()
        ]
        spans = [
            {
                "ph": "X",
                "name": self.rows[event.row].path[-1],
                "ts": round(event.began_s * 1e6, 3),
                "dur": round(event.seconds * 1e6, 3),
                "pid": 1,
                "tid": 2 if event.is_aside else 1,
                "args": self._arguments(event.row),
            }
            for event in sorted(self.events, key=lambda event: (event.began_s, -event.seconds))
        ]
        return {"traceEvents": [*heads, *spans], "displayTimeUnit": "ms"}

    def _arguments(self, row: int) -> dict[str, Any]:
        one = self.rows[row]
        told = {"ops": ", ".join(one.ops), "user": one.user, "module_path": one.module_path}
        return {name: value for name, value in told.items() if value}

    def perfetto_text(self) -> str:
        """The same as the text of a file."""
        return json.dumps(self.perfetto(), separators=(",", ":"))

    def __str__(self) -> str:
        """A table for people, in which equal pieces are one: milliseconds of a step, share of it, calls."""
        kinds = (f"{count} x {_told(batch)}" for batch, count in self.batches.items())
        more = max(len(self.batches) - 4, 0)
        batches = ", ".join([*itertools.islice(kinds, 4), *([f"{more} other kinds"] if more else [])])
        lines = [f"{self.num_steps} steps ({batches}): {1000 * self.seconds_per_step:.3f} ms a step"]
        lines += [f"  {note}" for note in self.notes]
        shown = [line for one in _merged(self.rows) for line in one.lines()]
        width = min(max((len(name) for name, *_ in shown), default=0), _WIDEST)
        lines.append(f"{'':<{width}} {'ms':>9} {'share':>7} {'calls':>7}")
        for name, row, where in shown:
            figures = f"{1000 * row.seconds_per_step:>9.3f} {self.share(row):>7.1%} {_calls(row):>7}"
            short = name if len(name) <= width else f"{name[: width - 1]}…"
            lines.append(f"{short:<{width}} {figures}  {where}".rstrip())
        return "\n".join(lines)

    def share(self, row: ProfileRow) -> float:
        """The row's part of the whole that it is in: of the steps, without recordings, for all but `replay`."""
        whole = next((one for one in self.rows if one.path == (STEP,)), row).seconds_per_step
        return row.seconds_per_step / whole if whole else 0.0


def _told(batch: BatchKind) -> str:
    return f"{batch.kind} of {batch.num_tokens} tokens, {batch.num_seqs} sequences"


def _calls(row: ProfileRow) -> str:
    return f"{row.calls_per_step:.0f}" if row.calls_per_step >= 10 else f"{row.calls_per_step:.3g}"


@dataclass(frozen=True)
class _Merged:
    """Rows that are shown as one: pieces of the same kernels."""

    rows: tuple[ProfileRow, ...]
    inside: tuple[_Merged, ...]

    def lines(self, depth: int = 0) -> Iterator[tuple[str, ProfileRow, str]]:
        """Indented names with their figures and the user's line; what is the row's own stands last."""
        first, indent = self.rows[0], "  " * depth
        is_one_of_many = len(self.rows) > 1 and first.path[-1].startswith(PIECE)
        more = f" and {len(self.rows) - 1} like it" if is_one_of_many else ""
        yield f"{indent}{first.path[-1]}{more}", self.row, "/".join((first.user or "").split("/")[-2:])
        for one in self.inside:
            yield from one.lines(depth + 1)
        if self.inside:
            own = self.row.seconds_per_step - sum(one.row.seconds_per_step for one in self.inside)
            yield f"{indent}  itself", replace(self.row, seconds_per_step=own), ""

    @property
    def row(self) -> ProfileRow:
        """The first one, with the sums of all."""
        return replace(
            self.rows[0],
            calls_per_step=sum(row.calls_per_step for row in self.rows),
            seconds_per_step=sum(row.seconds_per_step for row in self.rows),
        )


def _merged(rows: Sequence[ProfileRow]) -> tuple[_Merged, ...]:
    """The tree with equal pieces as one."""
    below: dict[tuple[str, ...], list[ProfileRow]] = {}
    for row in rows:
        below.setdefault(row.path[:-1], []).append(row)

    def kind(row: ProfileRow) -> tuple[str, ...]:
        inner = below.get(row.path, ())
        is_piece = inner and row.path[-1].startswith(PIECE)
        return tuple(sorted(one.path[-1] for one in inner)) if is_piece else (row.path[-1],)

    def merged(parents: Sequence[tuple[str, ...]]) -> tuple[_Merged, ...]:
        groups: dict[tuple[str, ...], list[ProfileRow]] = {}
        for parent in parents:
            for row in below.get(parent, ()):
                groups.setdefault(kind(row), []).append(row)
        return tuple(_Merged(tuple(group), merged([row.path for row in group])) for group in groups.values())

    return merged([()])
