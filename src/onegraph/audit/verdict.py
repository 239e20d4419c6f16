"""Judges one change: what the compiler is handed beside the keys, the index, and what was declared.

Two pieces must have the same key if and only if the compiler is handed the same: pieces of the base, pieces under the
change, and one of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

from onegraph.audit.outcome import Outcome
from onegraph.audit.perturbation import Perturbation
from onegraph.audit.witness import Handed

Verdict = Literal["fine", "refused", "stale", "unseen", "needless", "wrong prediction", "broken"]
FINDINGS = ("stale", "unseen", "needless", "wrong prediction", "broken")
"""What is wrong: an artifact, or a trace, that is for something else; a compile for nothing; a false declaration; a
setting that neither works nor is refused."""


@dataclass(frozen=True)
class Judged:
    """A change and what came of it. `changed` is the most of `graph`, `settings`, `region`, `nothing`.

    `index` says why a warm start wouldn't take the base's trace; None if it would.
    """

    perturbation: Perturbation
    verdict: Verdict
    why: str
    changed: tuple[str, ...] = ()
    num_keys: int = 0
    """How many keys there are that the base doesn't have."""
    index: str | None = None

    def to_dict(self) -> dict[str, Any]:
        one = self.perturbation
        return {
            "name": one.name,
            "was": one.was,
            "is": one.value,
            "affects": one.affects,
            "verdict": self.verdict,
            "why": self.why,
            "changed": list(self.changed),
            "new_keys": self.num_keys,
            "index": self.index,
        }


def judge(perturbation: Perturbation, base: Outcome, now: Outcome, index: str | None, state_holds: bool) -> Judged:
    """`index` is what `warm_start` says; `state_holds`, whether the running process would notice nothing."""
    changed = tuple(_changed(base.handed, now.handed, not perturbation.recaptures))
    keys = {one.key for one in now.handed} - {one.key for one in base.handed} - {None}
    verdict, why = _verdict(perturbation, base, now, changed, index, state_holds)
    if verdict == "fine":
        new = f"{len(keys)} new key{'' if len(keys) == 1 else 's'}"
        why = f"{' and '.join(changed) or 'nothing'} changed, {new}" if now.handed else "nothing of ours is compiled"
    return Judged(perturbation, verdict, why, changed, len(keys), index)


def _verdict(
    perturbation: Perturbation,
    base: Outcome,
    now: Outcome,
    changed: tuple[str, ...],
    index: str | None,
    state_holds: bool,
) -> tuple[Verdict, str]:
    stale = next(_same_key_other_input(base.handed, now.handed), None)
    if stale is not None:
        return "stale", f"piece {stale[1].index} has the key of piece {stale[0].index}, and {difference(*stale)}"
    if changed and index is None:
        return "unseen", f"{' and '.join(changed)} changed, and a warm start would take the trace of before"
    if changed and state_holds and perturbation.name.startswith("value."):
        return "unseen", f"{' and '.join(changed)} changed, and the check before each call holds"
    needless = next(_same_input_other_key(base.handed, now.handed), None)
    if needless is not None:
        return "needless", f"piece {needless[1].index} has another key than piece {needless[0].index}, and is the same"
    wrong = {"nothing": ("graph", "settings", "region"), "kernels": ("graph",)}.get(perturbation.affects or "", ())
    if set(wrong) & set(changed):
        return "wrong prediction", f"declared to affect {perturbation.affects}, and {' and '.join(changed)} changed"
    return "fine", ""


def _changed(base: Sequence[Handed], now: Sequence[Handed], as_twins: bool) -> Iterator[str]:
    """What of the pieces isn't the same. A piece that is made for fewer sizes besides has another region.

    With `as_twins` pieces that are gone stand for others.
    """
    if not now:
        return
    regions = {one.region for one in base} & {one.region for one in now}
    if not regions:  # other sizes altogether
        regions = {one.region for one in (*base, *now)}
    alike = [[one for one in several if one.region in regions] for several in (base, now)]
    for name in ("graph", "settings"):
        was, is_ = ({(one.index, one.region): getattr(one, name) for one in several} for several in alike)
        both = was.keys() | is_.keys() if name == "graph" and not as_twins else was.keys() & is_.keys()
        if any(was.get(one) != is_.get(one) for one in both):
            yield name
    if {one.region for one in base} != {one.region for one in now}:
        yield "region"


def _same_key_other_input(base: Sequence[Handed], now: Sequence[Handed]) -> Iterator[tuple[Handed, Handed]]:
    known: dict[str, Handed] = {}
    for one in (*base, *now):
        if one.key is not None and known.setdefault(one.key, one).input != one.input:
            yield known[one.key], one


def _same_input_other_key(base: Sequence[Handed], now: Sequence[Handed]) -> Iterator[tuple[Handed, Handed]]:
    known: dict[str, Handed] = {}
    for one in (*base, *now):
        if one.key is not None and known.setdefault(one.input, one).key != one.key:
            yield known[one.input], one


def difference(one: Handed, other: Handed) -> str:
    """The first thing that differs between two pieces, in words."""
    for line, its in zip_longest(one.graph.splitlines(), other.graph.splitlines()):
        if line != its:
            return f"its graph has {its or 'its end'!r} instead of {line or 'its end'!r}"
    if one.region != other.region:
        return f"its region is {other.region} instead of {one.region}"
    for name in sorted({*one.settings, *other.settings}):
        if one.settings.get(name) != other.settings.get(name):
            return f"{name} is {other.settings.get(name)} instead of {one.settings.get(name)}"
    return "it is the same"
