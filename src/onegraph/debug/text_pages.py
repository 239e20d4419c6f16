"""The lines of code and graphs as the report shows them: with their kind, and as differences of two."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from onegraph.debug.piece_facts import PIECE_TEXT

MOST_LINES = 20_000
"""So many lines of a text stand in a page; all of them in the plain text beside it."""
_MOST_DIFFED = 4_000

Line = tuple[str, str]
"""Kind and text: `c` comment, `add`, `cut`, `at`, or nothing."""


def code_lines(text: str) -> list[Line]:
    """The first lines of a text; comments are told apart."""
    return [("c" if line.lstrip().startswith(("#", "//")) else "", line) for line in text.split("\n")[:MOST_LINES]]


def diff_lines(before: str, after: str) -> list[Line]:
    """What changed, with three lines around; empty if nothing did."""
    if before == after:
        return []
    was, now = before.split("\n"), after.split("\n")
    if max(len(was), len(now)) > _MOST_DIFFED:
        return list(_without_order(was, now))
    kinds = {"+": "add", "-": "cut", "@": "at"}
    found = list(difflib.unified_diff(was, now, lineterm="", n=3))[2:]
    return [(kinds.get(line[:1], ""), line) for line in found]


def _without_order(was: list[str], now: list[str]) -> Iterator[Line]:
    """For texts on which difflib would take minutes: lines that only one of them has."""
    yield "at", "@@ these texts are long: lines that only one of them has @@"
    kept, new = set(now), set(was)
    yield from (("cut", f"-{line}") for line in was if line not in kept)
    yield from (("add", f"+{line}") for line in now if line not in new)


def piece_regions(group: Mapping[str, Any], entries: Mapping[str, str]) -> list[dict[str, Any]]:
    """A piece's texts for its page: each graph with what it changed of the one before, then the output code."""
    regions = []
    for region in group["texts"]:
        graphs = [_graph(graph, entries) for graph in region["graphs"]]
        for before, after in pairwise(graphs):
            after["diff"] = diff_lines(entries[before["name"]], entries[after["name"]])
            if after["diff"]:
                after["about"] = "What this pass changed."
            else:
                after["about"] = "This pass changed nothing."
        code = region["code"]
        regions.append(
            {
                "label": region["region"],
                "graphs": graphs,
                "code": None if code is None else {"name": code, "lines": code_lines(entries[code])},
            }
        )
    return regions


def _graph(graph: Mapping[str, Any], entries: Mapping[str, str]) -> dict[str, Any]:
    before = graph["pass"] is None
    return {
        "name": graph["name"],
        "anchor": "before" if before else f"after-{graph['pass']}",
        "title": "Before the passes" if before else f"After {graph['pass']}",
        "about": "The piece as it was cut out of the captured graph." if before else "",
        "lines": code_lines(entries[graph["name"]]),
        "diff": None,
    }


def text_name(name: str) -> bool:
    """Whether a text's name is one that this report makes files of: no trace chooses where they lie."""
    return len(name) <= 150 and (name in PLAIN_TEXTS or PIECE_TEXT.fullmatch(name) is not None)


PLAIN_TEXTS = {
    "captured_graph": ("Captured graph", "The whole forward as one graph, before it is split."),
    "split_graph": ("Split graph", "The graph that calls the pieces, and which piece is what."),
    "execution_plan": ("Execution plan", "The Python function that runs the pieces of a call."),
}
"""Texts that have a page of their own: title, and what they are."""
