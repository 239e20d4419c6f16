"""Why a key missed: the entry that is most like it, and the fields in which the two differ.

The same graph compiled otherwise comes first; where there is none, an entry of another graph with the fewest other
differences, and of those the one that shares most lines of its graph.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onegraph.ir.key import Key
from onegraph.store.manifest import Manifest

ABSENT = "(absent)"
_COMPARED_GRAPHS = 32
"""So many graphs are read to find the most similar one."""
_TOLD = 3
_LONG = 100


@dataclass(frozen=True)
class Difference:
    """A field of the keys' factors, as `compiler.config.inductor.size_asserts`, with the two values."""

    field: str
    was: Any
    now: Any

    def to_dict(self) -> dict[str, Any]:
        return {"field": self.field, "was": self.was, "is": self.now}

    def __str__(self) -> str:
        if isinstance(self.was, str) and isinstance(self.now, str) and max(len(self.was), len(self.now)) > _LONG:
            return f"{self.field}: {_other_words(self.was.split(), self.now.split())}"
        return f"{self.field}: was {_short(self.was)}, is {_short(self.now)}"


@dataclass(frozen=True)
class Nearest:
    """The entry that is most like a key that has none."""

    manifest: Manifest
    differs: tuple[Difference, ...]

    def __str__(self) -> str:
        told = "; ".join(map(str, self.differs[:_TOLD]))
        more = f"; and {len(self.differs) - _TOLD} more" if len(self.differs) > _TOLD else ""
        return f"the nearest, {self.manifest.key[:12]}… of {self.manifest.created}, differs in {told}{more}"


def nearest(key: Key, known: Sequence[Manifest], graph_of: Callable[[Manifest], str]) -> Nearest | None:
    """`known` is newest first; `graph_of` gives the text of an entry's graph, or nothing."""
    alike = [one for one in known if "graph" in one.factors]
    if "graph" not in key.factors or not alike:
        return None
    pool = [one for one in alike if one.factors["graph"] == key.factors["graph"]] or alike
    found = {one.key: tuple(differences(_but_graph(one.factors), _but_graph(key.factors))) for one in pool}
    fewest = min(map(len, found.values()))
    pool = [one for one in pool if len(found[one.key]) == fewest][:_COMPARED_GRAPHS]
    if pool[0].factors["graph"] == key.factors["graph"]:
        return Nearest(pool[0], found[pool[0].key])
    lines = set(key.graph.splitlines())
    best = max(pool, key=lambda one: len(lines & set(graph_of(one).splitlines())))
    was, now = first_difference(graph_of(best), key.graph)
    return Nearest(best, (Difference("graph", was, now), *found[best.key]))


def differences(was: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> Iterator[Difference]:
    """The fields that differ, innermost; a value that isn't there is ABSENT."""
    for name in dict.fromkeys((*was, *now)):
        old, new = was.get(name, ABSENT), now.get(name, ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if old != new:
                yield from differences(old, new, f"{within}{name}.")
        elif json.dumps(old) != json.dumps(new):  # a tuple in memory is a list on disk
            yield Difference(f"{within}{name}", old, new)


def first_difference(was: str, now: str) -> tuple[str, str]:
    """The first lines of two graphs that differ."""
    if not was:
        return "another graph, whose text wasn't kept", "this one"
    for old, new in itertools.zip_longest(was.splitlines(), now.splitlines(), fillvalue="its end"):
        if old != new:
            return old, new
    return "the same text", "the same text"


def packed_graph(text: str) -> bytes:
    """The contents of an entry's graph file: equal texts give equal bytes."""
    return gzip.compress(text.encode(), mtime=0)


def _but_graph(factors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in factors.items() if name != "graph"}


def _short(value: Any) -> str:
    text = value if value == ABSENT else repr(value)
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def _other_words(was: Sequence[str], now: Sequence[str]) -> str:
    """How a long list of words, such as the flags of a CPU, has changed."""
    lost = " ".join(word for word in was if word not in now)
    more = " ".join(word for word in now if word not in was)
    told = [f"{what} {_short(words)}" for what, words in (("lacks", lost), ("has also", more)) if words]
    return ", and ".join(told) or "is in another order"
