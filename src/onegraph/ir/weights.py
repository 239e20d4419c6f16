"""MergedWeight: several weights of a graph as one tensor, which its pieces read as a further input."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MergedWeight:
    """The rows of the sources, one below the other along dim 0.

    `name` is the plan's further input, `sources` are placeholders of the whole graph: `weight_3` is that of
    `captured.weights[3]`. The graph changes none of them, and two merged weights of a graph have no source in common,
    or all of them, in the same order.
    """

    name: str
    sources: tuple[str, ...]
