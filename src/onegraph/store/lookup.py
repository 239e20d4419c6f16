"""A store that is only asked what it has: nothing is compiled, written, moved aside or marked as used."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onegraph.env import Environment
from onegraph.ir.key import Key, Unkeyable
from onegraph.ir.piece import Piece
from onegraph.ir.region import Region
from onegraph.store.store import Store


@dataclass(frozen=True)
class Recompiled:
    """A stored artifact beside a fresh compile of the same piece: `problem` is how they differ, None if they don't."""

    piece: int
    key: str
    seconds: float
    """What the fresh compile took."""
    max_difference: float | None
    """Of the two's results on sample data; None where the piece takes no such data."""
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "piece": self.piece,
            "key": self.key,
            "seconds": round(self.seconds, 3),
            "max_difference": self.max_difference,
            "problem": self.problem,
        }


class Lookup(Store):
    """`asked` are the keys that it was asked for; `num_recompiled` artifacts are compared with fresh ones."""

    num_recompiled = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keeps = False
        self.asked: dict[str, Key] = {}
        self.recompiled: list[Recompiled] = []
        self._found: list[Callable[[], Recompiled]] = []

    @classmethod
    def configured(cls, current: Environment, num_recompiled: int = 0) -> Lookup:
        """As the environment has it. Raises ArtifactError."""
        made = Store.configured(current)
        made.open_base()
        lookup = cls(made.root, made.base, made.signer)
        lookup.num_recompiled = num_recompiled
        return lookup

    def begin(self, call: Any) -> None:
        """Told of each build, by its BuildCall."""

    def hand(
        self,
        piece: Piece,
        region: Region | None,
        device_type: str,
        options: Mapping[str, Any],
        key: Callable[[], Key | Unkeyable],
    ) -> None:
        """Told of each piece for each region, whatever the backend: what Inductor is given, or would be given.

        `key` makes the key of the artifact, under the settings that are in force when it is called.
        """

    def keep_trace(self, contents: bytes) -> None:
        """Told what the index would keep of a build, where it is given the index's key."""

    def found(self, recompile: Callable[[], Recompiled]) -> None:
        """Told of each artifact that it had, and how to compare it."""
        self._found.append(recompile)

    def recompile(self) -> None:
        """Compares a sample of what was found since, where that is asked for."""
        found, self._found = self._found, []
        number = min(len(found), self.num_recompiled - len(self.recompiled))
        self.recompiled += [one() for one in random.sample(found, number)]
