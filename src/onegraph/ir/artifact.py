"""An Artifact is what a compiler made of a piece for a region: files as bytes, and facts as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from onegraph.ir.autotune import TunedChoice
from onegraph.ir.key import Key
from onegraph.ir.ledger import ShapeEntry

PieceCallable = Callable[[list[Any]], Any]
"""Takes a list of the piece's inputs, which it may empty; returns the outputs as a tuple or list."""


Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Size, stride and dtype of a buffer."""


@dataclass(frozen=True)
class SizeSource:
    """Where a size comes from: one of a piece's inputs, and what is asked of it: nothing, or `.shape[0]`.

    `input` None stands for a symbol of the captured graph's sizes, which `asked` names.
    """

    input: int | None
    asked: str


@dataclass(frozen=True)
class BufferUse:
    """A buffer of a piece in words, and the first and the last step of the piece's call that use it."""

    name: str
    layout: str
    """`(u0, 64), (64, 1), torch.float32`, in the names of `PreparedPiece.size_names`."""
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class PreparedPiece:
    """A compiled piece whose buffers, and all that follows from sizes alone, are made once for a size.

    `scratch` are buffers whose use ends with the call, `results` those that outputs show; `scratch_layouts(*sizes)` and
    `results_layouts(*sizes)` give what to allocate, in the same order.
    """

    sizes: tuple[SizeSource, ...]
    size_names: tuple[str, ...]
    scratch: tuple[BufferUse, ...]
    results: tuple[BufferUse, ...]
    outputs: tuple[int | None, ...]
    """For each output the result that it shows; None for one that has memory of its own in every call."""
    scratch_layouts: Callable[..., list[Layout]]
    results_layouts: Callable[..., list[Layout]]
    scratch_views: Callable[..., tuple[torch.Tensor, ...]]
    """`scratch_views(buffers, *sizes)` gives what `bind` takes."""
    bind: Callable[[tuple[torch.Tensor, ...], Sequence[torch.Tensor | None], tuple[int, ...], bool], PieceCallable]
    """`bind(scratch views, result buffers, sizes, checks)` gives the callable for these sizes.

    A result buffer None is allocated in each call. With `checks` the layouts of inputs are compared, in each call, with
    what the code was compiled for: AssertionError.
    """


@dataclass(frozen=True, eq=False)
class PieceSource:
    """The Python that a piece's callable runs: `text`, and the names among which it runs.

    Each call looks its kernels up there, so that who profiles can put timers around them. `nodes` are the nodes of the
    graph that it was made of, in order, by the names that comments in the text call them; None where these are the
    piece's own.
    """

    text: str
    names: dict[str, Any]
    nodes: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class LoadedPiece:
    """A piece's callable, and its Python."""

    call: PieceCallable
    source: PieceSource

    def __call__(self, inputs: list[Any]) -> Any:
        """Runs the piece."""
        return self.call(inputs)


@dataclass(frozen=True, eq=False)
class PieceCode:
    """A piece's callable that tells more about itself.

    `kept_inputs` are those that it returns or shows in an output, or hands on to who may keep them: memory that will be
    used again must not come in there. Its outputs are laid out as the graph says.
    """

    call: PieceCallable
    kept_inputs: frozenset[int]
    prepared: PreparedPiece | None = None
    source: PieceSource | None = None

    def __call__(self, inputs: list[Any]) -> Any:
        """Runs the piece by itself, in memory that is allocated for this call."""
        return self.call(inputs)


@dataclass(frozen=True)
class OutputAlias:
    """An output that shares memory with an input: the input itself, or a view of it.

    The compiled code returns a tensor of the view's size, which is laid over the input: at `place`, Python text over
    `args`, the piece's inputs, for the strides and the bytes from the input's first element; None where that isn't
    known, and the compiled code's tensor tells.
    """

    output: int
    input: int
    is_view: bool
    place: str | None = None


@dataclass(frozen=True)
class OutputLayout:
    """An output whose memory must be dense, with its dims in this order: from the largest stride to the smallest."""

    output: int
    order: tuple[int, ...]


@dataclass(frozen=True)
class Artifact:
    """What is stored under a key, whole: nothing that it needs lies outside `files`.

    `files` maps names (`wrapper.py`, `kernels.so`) to contents; `constraints` are the conditions on sizes that
    compiling added; `layouts` are those of outputs that the compiler may lay out otherwise; `aligned_inputs` are those
    whose data has to begin at an aligned address, and which are copied where it doesn't; `guards` is torch's own
    expression for the conditions, for callers that keep their guards; `seconds` is what compiling took.
    """

    key: Key
    files: Mapping[str, bytes]
    aliases: tuple[OutputAlias, ...] = ()
    layouts: tuple[OutputLayout, ...] = ()
    aligned_inputs: tuple[int, ...] = ()
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
    edited: bool = False
    """Whether it runs code that somebody has edited: it computes what it likes, and is never recorded."""
