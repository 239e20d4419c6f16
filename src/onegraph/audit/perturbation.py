"""A Perturbation is one change of what a build is made of: a setting, a variable, or a value that the trace reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from onegraph.build_call import BuildCall

Scope = Callable[[BuildCall], contextlib.AbstractContextManager[BuildCall]]


@dataclass(frozen=True)
class Perturbation:
    """`name` is its kind and what is changed: `field.level`, `pass.merge_linears`, `value.self.scale`.

    `scope(call)` puts the change in force, and gives the call to build under it. `affects` is what is declared of a
    field. Without `recaptures` the change can't reach the graph, and the pieces of the base are asked again.
    """

    name: str
    was: str
    value: str
    scope: Scope
    affects: str | None = None
    recaptures: bool = True

    def is_named(self, words: Iterable[str]) -> bool:
        """Whether it is one of these, or in one of these groups; words may have `*`."""
        return any(fnmatchcase(self.name, word) or self.name.startswith(f"{word}.") for word in words)

    def __str__(self) -> str:
        return f"{self.name}={self.value}"
