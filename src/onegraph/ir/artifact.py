"""An Artifact is what a compiler made of a piece for a region: files as bytes, and facts as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from onegraph.ir.autotune import TunedChoice
from onegraph.ir.key import Key
from onegraph.ir.ledger import ShapeEntry

PieceCallable = Callable[[list[Any]], Any]
"""Takes a list of the piece's inputs, which it may empty; returns the outputs as a tuple or list."""


@dataclass(frozen=True)
class OutputAlias:
    """An output that shares memory with an input: the input itself, or a view of it.

    The compiled code returns a tensor of the view's size, strides and offset, which is laid over the input.
    """

    output: int
    input: int
    is_view: bool


@dataclass(frozen=True)
class OutputLayout:
    """An output whose memory must be dense, with its dims in this order: from the largest stride to the smallest."""

    output: int
    order: tuple[int, ...]


@dataclass(frozen=True)
class Artifact:
    """What is stored under a key, whole: nothing that it needs lies outside `files`.

    `files` maps names (`wrapper.py`, `kernels.so`) to contents; `constraints` are the conditions on sizes that
    compiling added; `layouts` are those of outputs that the compiler may lay out otherwise; `guards` is torch's own
    expression for the conditions, for callers that keep their guards; `seconds` is what compiling took.
    """

    key: Key
    files: Mapping[str, bytes]
    aliases: tuple[OutputAlias, ...] = ()
    layouts: tuple[OutputLayout, ...] = ()
    mutates_inputs: bool = False
    constraints: tuple[ShapeEntry, ...] = ()
    guards: str | None = None
    seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CompiledPiece:
    """A piece that can run, and how it came about: the record that `explain` shows."""

    call: PieceCallable
    backend: str
    store: str
    """`hit`, `miss` or `off`."""
    why: str
    seconds: float
    key: str | None = None
    mutates_inputs: bool = False
    """Whether it was compiled knowing which inputs share memory, so that others sharing it would be wrong."""
    constraints: tuple[ShapeEntry, ...] = ()
    same_as: int | None = None
    """The earlier piece whose artifact this one shares."""
    differs_from: str | None = None
    """The most similar earlier piece, and the first place where the two differ."""
    notes: tuple[str, ...] = ()
    """What its ops were lowered to, with the reasons."""
    autotuned: tuple[TunedChoice, ...] = ()
    """The kernels that were chosen by measuring."""
