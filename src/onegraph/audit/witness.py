"""A store that compiles and keeps nothing, and remembers what a build handed to the compiler and under which keys.

What is handed over is written down by `torch_compat.compiler_input`, which shares nothing with what makes keys. With
`backend=eager` too: the keys are those that Inductor's artifacts of the pieces would have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from onegraph.ir.key import Key, Unkeyable
from onegraph.ir.piece import Piece
from onegraph.ir.region import Region
from onegraph.store.lookup import Lookup
from onegraph.torch_compat.compiler_input import written_graph, written_settings


@dataclass(frozen=True)
class Handed:
    """A piece for a region, as the compiler has it; `key` is the digest under which its artifact is kept.

    `key` is None for one without a key, which is never kept, and for a splitting op, which isn't compiled.
    """

    index: int
    graph: str
    region: str
    settings: Mapping[str, str]
    key: str | None
    input: str
    """The digest of all that decides what is made of it."""
    ask_again: Callable[[], Handed] = field(compare=False)
    """The same piece under the settings that are in force now."""


class Witness(Lookup):
    """`handed` are all pieces in order, `trace` the build as the index would keep it, `call` the last BuildCall."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.handed: list[Handed] = []
        self.trace: bytes | None = None
        self.call: Any = None

    def begin(self, call: Any) -> None:
        self.call = call

    def hand(
        self,
        piece: Piece,
        region: Region | None,
        device_type: str,
        options: Mapping[str, Any],
        key: Callable[[], Key | Unkeyable],
    ) -> None:
        graph = written_graph(piece.graph_module, piece.fake_inputs, piece.fake_mode.shape_env)
        box = None if region is None else [[one[1:] for one in region.ranges], region.hints, region.predicate]

        def asked() -> Handed:
            found = key() if piece.kind == "compiled" else Unkeyable("it isn't compiled")
            digest = None if isinstance(found, Unkeyable) else found.digest
            settings = written_settings(options, device_type)
            whole = hashlib.sha256(f"{graph}\n{box}\n{settings}".encode()).hexdigest()
            return Handed(piece.index, graph, repr(box), settings, digest, whole, asked)

        self.handed.append(asked())

    def keep_trace(self, contents: bytes) -> None:
        self.trace = contents
