"""Which entry is nearest to a key that missed, and how the two are told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onegraph.ir.artifact import Artifact
from onegraph.ir.key import Key
from onegraph.store.manifest import Manifest
from onegraph.store.nearest import ABSENT, Difference, differences, first_difference, nearest, packed_graph
from onegraph.store.store import Store

TEXTS = {"g1": "%0 = x\n%1 = exp\n%2 = output", "g2": "%0 = x\n%1 = sin\n%2 = output", "g3": "%0 = y"}


def entry(graph: str, created: str = "2026-01-01T00:00:00+00:00", **factors: Any) -> Manifest:
    return replace(Manifest.of(Artifact(key(graph, **factors), {}), {}), created=created)


def key(graph: str, **factors: Any) -> Key:
    return Key.of({"graph": graph, "threads": 2, "config": {"a": 1, "b": {"c": [1, 2]}}, **factors}, TEXTS[graph])


def found(asked: Key, *known: Manifest) -> tuple[str, list[tuple[str, Any, Any]]] | None:
    near = nearest(asked, known, lambda manifest: TEXTS[manifest.factors["graph"]])
    return near and (near.manifest.factors["graph"], [(one.field, one.was, one.now) for one in near.differs])


def test_differences_are_innermost_and_lists_are_values() -> None:
    was, now = {"a": {"b": {"c": 1, "d": (1, 2)}}, "e": 1}, {"a": {"b": {"c": 2, "d": [1, 2]}}, "f": None}
    assert list(differences(was, now)) == [
        Difference("a.b.c", 1, 2), Difference("e", 1, ABSENT), Difference("f", ABSENT, None)
    ]  # fmt: skip


def test_true_is_no_one() -> None:
    assert [one.field for one in differences({"a": True, "b": 0}, {"a": 1, "b": 0.0})] == ["a", "b"]


def test_the_same_graph_comes_first_and_of_those_the_fewest_differences() -> None:
    asked = key("g1", threads=8)
    assert found(asked, entry("g2", threads=8), entry("g1", config={}), entry("g1")) == ("g1", [("threads", 2, 8)])


def test_of_other_graphs_the_one_with_most_lines_in_common() -> None:
    assert found(key("g1"), entry("g3"), entry("g2"), entry("g2", threads=1)) == (
        "g2",
        [("graph", "%1 = sin", "%1 = exp")],
    )


def test_entries_of_other_kinds_are_never_near() -> None:
    other = replace(entry("g1"), factors={"op_kernels": {}, "target": "cpu"})
    assert found(key("g1"), other) is None and found(Key.of({"op_kernels": {}}), other, entry("g1")) is None
    assert found(key("g1")) is None


def test_what_is_told_is_short() -> None:
    near = nearest(key("g1", threads="x" * 999, d=1, e=2, f=3), [entry("g1")], lambda manifest: "")
    text = str(near)
    assert text.endswith("; and 1 more") and "is 'xxx" in text and len(text) < 400
    assert "d: was (absent), is 1" in text and "of 2026-01-01T00:00:00+00:00, differs in threads: was 2" in text


@pytest.mark.parametrize(
    ("was", "now", "told"),
    [
        ("a\nb", "a\nc", ("b", "c")),
        ("a", "a\nb", ("its end", "b")),
        ("", "a", ("another graph, whose text wasn't kept", "this one")),
    ],
)
def test_the_first_line_that_differs(was: str, now: str, told: tuple[str, str]) -> None:
    assert first_difference(was, now) == told


def test_equal_graphs_are_packed_alike() -> None:
    assert packed_graph("a" * 99) == packed_graph("a" * 99) != packed_graph("a" * 98)


def test_an_entry_is_compared_with_those_before_it(tmp_path: Path) -> None:
    store, old, new = Store(tmp_path), key("g1", threads=1), key("g1", threads=2)
    store.write(Artifact(old, {"wrapper.py": b"old"}))
    assert old.digest[:12] in store.why_missed(new)
    store.write(Artifact(new, {"wrapper.py": b"new"}))
    near = store.nearest_to(new.digest)
    assert near is not None and near.manifest.key == old.digest
    assert [one.to_dict() for one in near.differs] == [{"field": "threads", "was": 1, "is": 2}]
    path = store.path_of(new.digest, "wrapper.py")
    assert path is not None and path.read_bytes() == b"new"
    assert store.nearest_to("0" * 64) is None and store.path_of(new.digest, "kernels.so") is None
