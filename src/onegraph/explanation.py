"""Explanation: everything that is known about how a model was compiled, as data and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from onegraph.ir.autotune import TunedChoice
from onegraph.ir.custom_op import CustomOp
from onegraph.ir.dims import DynamicDim
from onegraph.ir.ledger import Ledger
from onegraph.ir.padding import PaddedSizes, StepInput, padding_lines
from onegraph.ir.passes import NearMiss, PassRun
from onegraph.ir.plan import BufferPlan
from onegraph.ir.recording import RecordedSize, RecordingPlan, Uncovered, recorded_lines
from onegraph.numerics.oracle import SizeCheck
from onegraph.plan.buffers import buffer_lines

_LISTED_STATE = 24
"""So many facts of Python state are listed in the text; a transformers model has over a thousand."""


@dataclass(frozen=True)
class RangeExplanation:
    """One region's artifact: the sizes of the first dim, and whether the store had it, with the reason.

    `predicate` is the condition on sizes for which it runs, where there is more than one region.
    """

    min: int | None
    max: int | None
    predicate: str | None
    key: str | None
    store: str
    why: str
    seconds: float
    autotuned: tuple[TunedChoice, ...] = ()
    edited: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "min": self.min,
            "max": self.max,
            "predicate": self.predicate,
            "key": self.key,
            "store": self.store,
            "why": self.why,
            "seconds": round(self.seconds, 3),
            "autotuned": [choice.to_dict() for choice in self.autotuned],
            "edited": self.edited,
        }


@dataclass(frozen=True)
class PieceExplanation:
    """One piece: which backend runs it, and its artifact for each range.

    `same_as` is the earlier piece whose artifact it shares; `why` names the splitting ops with the user's lines.
    """

    index: int
    kind: str
    backend: str
    ranges: tuple[RangeExplanation, ...]
    same_as: int | None = None
    differs_from: str | None = None
    module_path: str = ""
    why: str = ""
    num_ops: int = 0
    passes: Mapping[str, int] = field(default_factory=dict)
    """How often each pass that ran over it has rewritten something."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "kind": self.kind,
            "same_as": self.same_as,
            "differs_from": self.differs_from,
            "module_path": self.module_path,
            "why": self.why,
            "ops": self.num_ops,
            "backend": self.backend,
            "ranges": [one.to_dict() for one in self.ranges],
            "passes": dict(self.passes),
        }


@dataclass(frozen=True)
class PassExplanation:
    """One pass over all pieces: its rewrites, in how many pieces, the seconds, and where it nearly matched.

    `skipped` says why it didn't run, where it ran nowhere.
    """

    name: str
    rewrites: int
    num_pieces: int
    seconds: float
    near_misses: tuple[tuple[NearMiss, int], ...]
    """Each with the number of pieces that have it."""
    skipped: str | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "rewrites": self.rewrites,
            "pieces": self.num_pieces,
            "seconds": round(self.seconds, 4),
            "skipped": self.skipped,
            "near_misses": [{"why": miss.why, "where": miss.where, "pieces": n} for miss, n in self.near_misses],
        }


def explained_passes(runs: Iterable[PassRun]) -> tuple[PassExplanation, ...]:
    """The records of all pieces, each pass once."""
    by_name: dict[str, list[PassRun]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    return tuple(
        PassExplanation(
            name=name,
            rewrites=sum(run.rewrites for run in found),
            num_pieces=sum(run.rewrites > 0 for run in found),
            seconds=sum(run.seconds for run in found),
            near_misses=tuple(Counter(miss for run in found for miss in run.near_misses).items()),
            skipped=found[0].skipped if all(run.skipped for run in found) else None,
        )
        for name, found in by_name.items()
    )


@dataclass(frozen=True)
class IndexExplanation:
    """Whether the index had the whole build (`hit`, `miss`, or `off` where it can't), and why."""

    status: str
    why: str

    def to_dict(self) -> dict[str, str]:
        return {"status": self.status, "why": self.why}


@dataclass(frozen=True)
class Explanation:
    """What `compiled.explain()` returns: `to_dict()` is what `onegraph explain --json` prints, `str()` for people."""

    model: str
    config: dict[str, dict[str, Any]]
    stages: tuple[tuple[str, float], ...] = ()
    dims: tuple[DynamicDim, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    pieces: tuple[PieceExplanation, ...] = ()
    passes: tuple[PassExplanation, ...] = ()
    """In the order in which they ran."""
    plan_source: str = ""
    """The function that runs the pieces, as it was printed from the execution plan."""
    buffers: BufferPlan | None = None
    """The memory that intermediate values share; None where each piece allocates its own."""
    num_ops: int = 0
    custom_ops: tuple[CustomOp, ...] = ()
    notes: tuple[str, ...] = ()
    checks: tuple[SizeCheck, ...] = ()
    """Sizes at which compiled was compared with eager and fp64."""
    device: str | None = None
    """What it is compiled for, in words; None where nothing is."""
    index: IndexExplanation | None = None
    """Whether the whole build was there already; None where nothing is compiled."""
    recorded: tuple[RecordedSize, ...] = ()
    """What is recorded, by size of the first dim."""
    recording_plan: RecordingPlan | None = None
    """What was to be recorded, or will be when it first comes."""
    uncovered: tuple[Uncovered, ...] = ()
    """Sizes at which calls run without a recording."""
    padded: tuple[PaddedSizes, ...] = ()
    """Sizes at which calls run at a recorded one."""
    recorded_inputs: tuple[StepInput, ...] = ()
    """What each call fills: the inputs that recordings have buffers for."""
    recorded_memory: tuple[Mapping[str, Any], ...] = ()
    """The memory of others that the recordings rely on: name, owner, address, bytes."""
    pending: tuple[str, ...] = ()
    """Of a build that was only compiled, what the process that loads it does first."""

    @property
    def start(self) -> str:
        """`cold` if a piece was compiled, `warm` if all came from the store, `eager` if nothing is compiled."""
        compiled = [piece for piece in self.pieces if piece.backend == "inductor"]
        if not compiled:
            return "eager"
        return "warm" if all(one.store == "hit" for piece in compiled for one in piece.ranges) else "cold"

    @property
    def plan_text(self) -> str:
        """The function, with what lies where in the memory of a call."""
        return "\n".join([self.plan_source, *(buffer_lines(self.buffers) if self.buffers else ())])

    @property
    def passes_text(self) -> str:
        """Each pass with what it rewrote, and where it nearly did."""
        lines = []
        for one in self.passes:
            done = one.skipped or f"{one.rewrites} rewrites in {one.num_pieces} pieces, {one.seconds:.3f} s"
            lines.append(f"{one.name}: {done}")
            for miss, count in one.near_misses:
                pieces = f", {count} pieces" if count > 1 else ""
                lines.append(f"  not here: {miss.why}  ({miss.where or 'torch'}{pieces})")
        return "\n".join(lines) or "no pass ran"

    @property
    def _state_checked(self) -> str:
        if any(entry.checked == "call" for entry in self.ledger.state):
            return "checked on every call"
        owned = any(entry.checked == "event" for entry in self.ledger.state)
        return "checked when the model's owner says so" if owned else "not checked: freeze=True"

    @property
    def not_seen(self) -> str | None:
        """What changes of Python state this way of checking can't see; None where each call is checked."""
        if not self.pieces or any(entry.checked == "call" for entry in self.ledger.state):
            return None
        if any(entry.checked == "event" for entry in self.ledger.state):
            return "a change of the module while requests are running; it is seen when the engine is idle again"
        return "any change of Python state but a weight's dtype, shape and device: freeze=True promises that none comes"

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "device": self.device,
            "config": self.config,
            "stages": [{"name": name, "seconds": round(seconds, 3)} for name, seconds in self.stages],
            "dims": [dim.to_dict() for dim in self.dims],
            "graph": {"ops": self.num_ops},
            "ledger": {**self.ledger.to_dict(), "not_seen": self.not_seen},
            "index": None if self.index is None else self.index.to_dict(),
            "pieces": [piece.to_dict() for piece in self.pieces],
            "passes": [one.to_dict() for one in self.passes],
            "custom_ops": [op.to_dict() for op in self.custom_ops],
            "plan": self._plan_dict() if self.pieces or self.recorded else None,
            "check": [check.to_dict() for check in self.checks],
        }

    def _plan_dict(self) -> dict[str, Any]:
        return {
            "mode": self.config["cudagraph_mode"]["value"],
            "planned": None if self.recording_plan is None else self.recording_plan.to_dict(),
            "sizes": [one.to_dict() for one in self.recorded],
            "uncovered": [one.to_dict() for one in self.uncovered],
            "padded": [one.to_dict() for one in self.padded],
            "buffers": [one.to_dict() for one in self.recorded_inputs],
            "memory": [dict(use) for use in self.recorded_memory],
        }

    def __str__(self) -> str:
        nothing = "not compiled, recorded as it is" if self.recorded else "nothing compiled yet"
        lines = [f"{self.model}: {self.start} start" if self.pieces else f"{self.model}: {nothing}"]
        if self.stages:
            lines += [f"device   {self.device}"] if self.device else []
            lines.append("stages   " + "  ".join(f"{name} {seconds:.2f} s" for name, seconds in self.stages))
        if self.index is not None:
            lines.append(f"index    {self.index.status}: {self.index.why}")
        if self.pieces:
            lines.append(f"graph    {self.num_ops} operations")
        for dim in self.dims:
            further = [f"{len(dim.inputs) - 4} more"] if len(dim.inputs) > 4 else []
            lines.append(f"dim      {dim.name} = {dim.min}..{dim.max}  ({', '.join([*dim.inputs[:4], *further])})")
        if self.passes:
            counts = (f"{one.name} {one.skipped or one.rewrites}" for one in self.passes)
            lines.append(f"passes   {'  '.join(counts)}")
        lines += self._piece_lines()
        if self.pieces:
            proven = sum(entry.effect == "proven" for entry in self.ledger.shapes)
            lines.append(
                f"ledger   {len(self.ledger.inputs)} input facts checked on every call, {proven} conditions on sizes "
                f"proven, {len(self.ledger.state)} facts of Python state {self._state_checked}"
            )
        for entry in self.ledger.shapes:
            lines.append(f"  {entry.effect}: {entry.expr}  ({entry.stage}, {entry.user or entry.framework or 'torch'})")
        if len(self.ledger.state) <= _LISTED_STATE:
            lines += [f"  {entry.what} = {entry.value}  ({entry.user or 'torch'})" for entry in self.ledger.state]
        else:
            lines.append("  (to_dict(), or `onegraph explain --json`, lists all facts)")
        lines += [f"  not seen: {self.not_seen}"] if self.not_seen else []
        lines += [f"  for this process alone: {reason}" for reason in self.ledger.unindexable]
        for op in self.custom_ops:
            state = "checked on the first call's values" if op.checked else "pending: to be checked on a call's values"
            lines.append(f"op       {op.name}  {state}  ({op.user})")
        if self.recording_plan is not None:
            lines += [f"records  {line}" for line in self.recording_plan.lines()]
        lines += [f"recorded {line}" for line in recorded_lines(self.recorded)]
        lines += [f"  padded: {line}" for line in padding_lines(self.padded, self.recorded_inputs)]
        if self.recording_plan is None:
            lines += [f"  not recorded: {one}" for one in self.uncovered if self.recorded]
        chosen = [(name, item) for name, item in self.config.items() if item["why"] != "default"]
        lines += [f"config   {name} = {item['value']}  ({item['why']})" for name, item in chosen]
        lines += [f"note     {note}" for note in self.notes]
        if self.checks:
            lines += self._check_lines()
        return "\n".join(lines)

    def _piece_lines(self) -> list[str]:
        """A line for each distinct piece and region, and one that counts the pieces where there are many."""
        lines = []
        if len(self.pieces) > 1:
            splitting = [piece for piece in self.pieces if piece.kind == "splitting_op"]
            distinct = [piece for piece in self.pieces if piece.kind == "compiled" and piece.same_as is None]
            lines.append(
                f"pieces   {len(self.pieces)}: {len(self.pieces) - len(splitting)} compiled, of which "
                f"{len(distinct)} differ, and {len(splitting)} of splitting ops"
            )
            lines += [f"  split at {why}" for why in dict.fromkeys(piece.why for piece in splitting)]
        for piece in self.pieces:
            twins = [other.index for other in self.pieces if other.same_as == piece.index]
            also = f" (also {_numbers(twins)})" if twins else ""
            path = f" {piece.module_path}" if piece.module_path and len(self.pieces) > 1 else ""
            for one in piece.ranges if piece.same_as is None else ():
                region = f" where {one.predicate}" if one.predicate else ""
                lines.append(f"piece {piece.index}{also}{path}  {piece.backend}{region}, store {one.store}: {one.why}")
                lines += [f"  autotuned {choice}" for choice in one.autotuned]
            if piece.differs_from and piece.same_as is None:
                lines.append(f"  differs from {piece.differs_from}")
        return lines

    def _check_lines(self) -> list[str]:
        """The check of numbers: how many sizes are in order, the worst of them, and each that isn't."""
        wrong = [check for check in self.checks if not check.ok]
        worst = max(self.checks, key=lambda check: (not check.ok, check.found.max_error))
        sizes = ", ".join(str(check.num_tokens) for check in self.checks)
        found = worst.found
        return [
            f"check    {len(self.checks) - len(wrong)} of {len(self.checks)} sizes in order ({sizes}); worst at "
            f"{worst.num_tokens}: error {found.max_error:.2g} against fp64, eager's {found.eager_error:.2g}",
            *(f"  wrong at {check.num_tokens}: {check.found.where}" for check in wrong),
        ]


def _numbers(values: list[int]) -> str:
    """`2, 4, 6 … 58`: the first three and the last, or all of a few."""
    shown = [str(value) for value in values]
    return ", ".join(shown) if len(shown) <= 4 else f"{', '.join(shown[:3])} … {shown[-1]}"
