"""Runs the audit: builds the base, then once more under each change, one at a time, and judges what came of it.

Takes a BuildCall whose store is a Lookup: nothing is compiled or written. Gives a Report. After each change all is as
it was, which the last build shows: that of the base once more.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onegraph.audit.captured_values import CapturedValues, captured_values
from onegraph.audit.outcome import COMPILING, Outcome, asked_again, outcome, revived_reads, warm_start
from onegraph.audit.perturbation import Perturbation
from onegraph.audit.settings import settings
from onegraph.audit.verdict import FINDINGS, Judged, judge
from onegraph.build_call import BuildCall
from onegraph.errors import ConfigError, OnegraphError, nearest

GROUPS = ("field", "pass", "env", "torch", "inductor", "value")
Progress = Callable[[Sequence[Perturbation]], Iterator[Perturbation]]


@dataclass(frozen=True)
class Report:
    """`num_read` values were read by the trace; `num_alike` of them stand for another layer's and weren't changed.

    `trace` says why no warm start takes the base's trace, None if one does: then no check of it can be too weak.
    """

    model: str
    backend: str
    num_pieces: int
    num_read: int
    num_alike: int
    trace: str | None
    judged: tuple[Judged, ...]

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(one.verdict for one in self.judged))

    @property
    def ok(self) -> bool:
        return not any(one.verdict in FINDINGS for one in self.judged)

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "model": self.model,
            "backend": self.backend,
            "pieces": self.num_pieces,
            "values": {"read": self.num_read, "alike": self.num_alike},
            "trace": self.trace,
            "counts": self.counts,
            "changes": [one.to_dict() for one in self.judged],
        }


def audit(call: BuildCall, only: Sequence[str], progress: Progress) -> Report:
    """`only` are names of changes or groups of them, with `*`; empty for all.

    Raises ConfigError for a name that there isn't, and for a base under which nothing of ours is compiled.
    """
    if call.config.mode not in COMPILING:
        raise ConfigError(
            f"mode={call.config.mode.name} ({call.config.why['mode']}) compiles nothing of ours, so there are no keys",
            where="audit",
            hint="leave -O0 or --enforce-eager out",
        )
    base = outcome(call)
    assert base.built is not None
    values = captured_values(revived_reads(base, call))
    chosen = _chosen([*settings(call, base.built.explanation.dims), *values.perturbations], only)
    judged = [_judged(one, base, call) for one in progress([*chosen, _control()])]
    return _report(base, call, values, judged)


def _report(base: Outcome, call: BuildCall, values: CapturedValues, judged: list[Judged]) -> Report:
    compiled = sum(one.key is not None for one in base.handed)
    trace = base.unkept if base.trace is None else None
    return Report(call.name, call.config.backend, compiled, values.num_read, values.num_alike, trace, tuple(judged))


def _chosen(found: list[Perturbation], only: Sequence[str]) -> list[Perturbation]:
    for word in only:
        if not any(one.is_named([word]) for one in found):
            names = [*GROUPS, *(one.name for one in found)]
            raise ConfigError(f"the audit has no change {word!r}", where="--only", hint=nearest(word, names))
    return [one for one in found if not only or one.is_named(only)]


def _control() -> Perturbation:
    """No change at all: what it finds is a change that wasn't undone, or a build that isn't the same twice."""
    return Perturbation("control", "", "the base once more", contextlib.nullcontext, "nothing")


def _judged(one: Perturbation, base: Outcome, call: BuildCall) -> Judged:
    with contextlib.ExitStack() as scope:
        try:
            changed = scope.enter_context(one.scope(call))
            index = warm_start(base, changed, same_state=not one.recaptures)
            holds = base.built is None or base.built.holds is None or base.built.holds()
            now = outcome(changed) if one.recaptures else asked_again(base, changed)
        except Exception as error:  # noqa: BLE001 - the user's code under a value that it never had may raise anything
            ours = isinstance(error, OnegraphError)
            told = f"{'' if ours else f'{type(error).__name__}: '}{str(error).partition(chr(10))[0]}"
            is_setting = one.name.startswith(("field.", "pass.", "env."))
            return Judged(one, "broken" if is_setting and not ours else "refused", told[:200])
        return judge(one, base, now, index, holds)
