"""Autotuned choices as data: what a compiler asks, what was measured, and what was chosen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class TuningQuestion:
    """Which of several kernels an op gets.

    `op` is as the compiler calls it (`bmm`); `inputs` have dtype, sizes and strides, dynamic sizes as their hints;
    `candidates` are names, in the compiler's order, and `sources` identify the code of each.
    """

    op: str
    inputs: tuple[str, ...]
    candidates: tuple[str, ...]
    sources: tuple[str, ...]

    def digest(self, machine: Mapping[str, Any]) -> str:
        """The sha256 (hex) of the question on a machine: equal ones have one answer."""
        text = json.dumps([asdict(self), dict(machine)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class TunedChoice:
    """The answer: `microseconds` has each candidate's time, None where it couldn't be measured."""

    op: str
    inputs: tuple[str, ...]
    microseconds: Mapping[str, float | None]
    choice: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "op": self.op,
            "inputs": list(self.inputs),
            "microseconds": dict(self.microseconds),
            "choice": self.choice,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TunedChoice:
        """Raises KeyError, TypeError or ValueError for what `to_dict` doesn't make."""
        times = {str(name): None if time is None else float(time) for name, time in data["microseconds"].items()}
        if not isinstance(data["op"], str) or not isinstance(data["choice"], str):
            raise TypeError("op and choice are names")
        return cls(data["op"], tuple(map(str, data["inputs"])), times, data["choice"])

    def __str__(self) -> str:
        times = sorted(self.microseconds.items(), key=lambda item: (item[1] is None, item[1] or 0.0, item[0]))
        measured = ", ".join(f"{name} {'failed' if time is None else f'{time:.3g} us'}" for name, time in times)
        return f"{self.op} of {' and '.join(self.inputs)}: {self.choice} (measured: {measured})"


Choose = Callable[[TuningQuestion, Callable[[], Mapping[str, float | None]]], str]
"""Answers a question with one of its candidates; the second argument measures them all, in microseconds."""


class ChoiceRecords(Protocol):
    """Where choices are kept, by the question's digest."""

    def read(self, digest: str) -> TunedChoice | None:
        """The recorded choice."""
        ...

    def keep(self, digest: str, choice: TunedChoice, machine: Mapping[str, Any]) -> None:
        """Records a choice, with the facts under which it holds."""
        ...

    def measuring(self) -> AbstractContextManager[None]:
        """Held while measuring, so that one process measures at a time and the others take what it recorded."""
        ...

    def asked_by(self, piece: str) -> tuple[str, ...] | None:
        """The digests of the questions that compiling a piece asks; None before it was compiled once."""
        ...

    def keep_asked(self, piece: str, digests: tuple[str, ...]) -> None:
        """Records them."""
        ...
