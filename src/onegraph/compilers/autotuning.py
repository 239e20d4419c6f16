"""The autotuned choices of one piece: measured and recorded, or taken from the record.

Equal questions on equal machines have one answer, whoever asks: the first process to measure records it. The answers
are part of the artifact's key, so an artifact that was made under other choices is another artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from onegraph.counters import counters
from onegraph.errors import ArtifactError, CompileError, ConfigError
from onegraph.ir.autotune import ChoiceRecords, TunedChoice, TuningQuestion
from onegraph.ir.key import Key


class Autotuning:
    """`mode` is record or replay; `machine` are the facts under which a choice holds; `records` None keeps nothing.

    Raises ConfigError for a replay of no records.
    """

    def __init__(self, mode: str, machine: Mapping[str, Any], records: ChoiceRecords | None) -> None:
        if mode == "replay" and records is None:
            raise ConfigError(
                "autotune=replay takes choices from the compile cache, and that is off",
                where="autotune",
                hint="leave ONEGRAPH_DISABLE_COMPILE_CACHE out, or autotune=replay",
            )
        self.mode, self.machine, self.records = mode, machine, records
        self._made: dict[str, TunedChoice] = {}

    @property
    def made(self) -> tuple[TunedChoice, ...]:
        """The choices that compiling asked for, in order."""
        return tuple(self._made.values())

    def choose(self, question: TuningQuestion, measure: Callable[[], Mapping[str, float | None]]) -> str:
        """The candidate to take. Raises CompileError where nothing is recorded to replay, ArtifactError for a record
        that names none of the candidates."""
        digest = question.digest(self.machine)
        known = self._made.get(digest)
        if known is None and self.records is not None:
            known = self.records.read(digest)
        if known is None and self.mode == "replay":
            raise CompileError(
                f"no choice is recorded for {question.op} of {' and '.join(question.inputs)} on this machine, "
                "and autotune=replay measures nothing",
                where=f"one of {', '.join(question.candidates)}",
                hint="run once with -O.autotune=record and the same compile cache",
            )
        if known is None:
            known = self._measured_once(digest, question, measure)
        if known.choice not in question.candidates:
            raise ArtifactError(
                f"the recorded choice for {question.op} is {known.choice!r}, which is none of its kernels",
                where=f"autotuned/choices/{digest[:2]}/{digest}.json",
                hint=f"one of {', '.join(question.candidates)}, or remove the file",
            )
        self._made[digest] = known
        return known.choice

    def _measured_once(
        self, digest: str, question: TuningQuestion, measure: Callable[[], Mapping[str, float | None]]
    ) -> TunedChoice:
        if self.records is None:
            return _measured(question, measure)
        with self.records.measuring():
            known = self.records.read(digest)  # of the process that measured while this one waited
            if known is None:
                known = _measured(question, measure)
                self.records.keep(digest, known, self.machine)
        return known

    def recorded_key(self, piece: Key) -> Key | None:
        """The key of the artifact that the piece is now, by what is recorded; None where that is not known whole."""
        asked = None if self.records is None else self.records.asked_by(piece.digest)
        if asked is None or self.records is None:
            return None
        choices = {digest: self.records.read(digest) for digest in asked}
        return None if None in choices.values() else _with_choices(piece, {d: c for d, c in choices.items() if c})

    def settled_key(self, piece: Key) -> Key:
        """The key of what was compiled of the piece, by the choices that were made. Records what it asks."""
        if self.records is not None:
            self.records.keep_asked(piece.digest, tuple(self._made))
        return _with_choices(piece, self._made)


def _measured(question: TuningQuestion, measure: Callable[[], Mapping[str, float | None]]) -> TunedChoice:
    counters.add("autotune_benchmarks")
    times = measure()
    measured = {name: time for name, time in times.items() if time is not None}
    best = min(measured, key=measured.__getitem__) if measured else question.candidates[0]  # the library's own
    return TunedChoice(question.op, question.inputs, times, best)


def _with_choices(piece: Key, choices: Mapping[str, TunedChoice]) -> Key:
    """Of the digests, which know everything of a question, and what was chosen; times are no part of it."""
    made = {digest: f"{one.op}: {one.choice}" for digest, one in choices.items()}
    return Key.of({**piece.factors, "autotuned": made}, piece.graph)
