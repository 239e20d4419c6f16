"""From pieces to something that runs: by the configured backend, and with Inductor through the store.

Takes pieces and a region; gives a CompiledPiece for each, with the reason why it was compiled or loaded. Pieces that
are equal share one. A fresh artifact is written and then loaded from its files, so that cold and warm starts run the
same code.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onegraph.compilers import aot_eager, eager, inductor
from onegraph.compilers.graph_text import graph_text
from onegraph.compilers.key import piece_key
from onegraph.config.resolve import ResolvedConfig
from onegraph.counters import counters
from onegraph.ir.artifact import Artifact, CompiledPiece, PieceCallable
from onegraph.ir.key import Key, Unkeyable
from onegraph.ir.ledger import ShapeEntry
from onegraph.ir.piece import Piece
from onegraph.ir.region import Region
from onegraph.ir.target import Target
from onegraph.log import get_logger
from onegraph.op_kernels import install_op_kernels, uses_own_ops
from onegraph.store.store import Store
from onegraph.torch_compat import shapes
from onegraph.torch_compat.structured_trace import trace_text

log = get_logger(__name__)

SAME_AS_EAGER = {"fallback_random": True}
"""Options of Inductor without which its result differs from eager: random ops would draw from another stream."""

Identity = tuple[str, tuple[str | None, ...]]
"""A piece's canonical text, and the dims that its inputs' sizes stand for, in order."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PieceCompiler:
    """`store` None means that nothing is read or written.

    `check_sizes(conditions)` judges what compiling came to assume about sizes, and raises ConstraintError for
    what the declared ranges don't imply: before anything is written.
    """

    config: ResolvedConfig
    target: Target
    store: Store | None
    check_sizes: Callable[[list[shapes.RawCondition]], tuple[ShapeEntry, ...]]

    def compile_all(
        self, pieces: Sequence[Piece], region: Region | None, dims: Mapping[str, str], progress: Progress | None = None
    ) -> tuple[CompiledPiece, ...]:
        """Each piece that differs from all before it is compiled; `dims` names the dim that a symbol stands for.

        `progress(done, total)` counts the pieces. Raises as `compile`.
        """
        made: list[CompiledPiece] = []
        known: dict[Identity, int] = {}
        for piece in pieces:
            if progress is not None:
                progress(len(made), len(pieces))
            if piece.kind == "splitting_op":
                why, notes = "a splitting op runs as it is", self._kernels_of_ops(piece)
                made.append(CompiledPiece(eager.compile_piece(piece), "eager", "off", why, 0.0, notes=notes))
                continue
            identity = None if piece.index in self.config.eager_pieces else _identity(piece, dims)
            twin = None if identity is None else known.get(identity)
            if twin is not None:
                made.append(replace(made[twin], same_as=twin, seconds=0.0, differs_from=None))
                continue
            differs_from = None if identity is None else _nearest(identity, known)
            if identity is not None:
                known[identity] = piece.index
            made.append(replace(self.compile(piece, region), differs_from=differs_from))
        return tuple(made)

    def compile(self, piece: Piece, region: Region | None) -> CompiledPiece:
        """Needs `torch_compat.dynamo.compile_scope`. Raises CompileError, ConstraintError."""
        started = time.perf_counter()
        backend = "eager" if piece.index in self.config.eager_pieces else self.config.backend
        if backend != "eager" and piece.eager_why:
            made = CompiledPiece(eager.compile_piece(piece), "eager", "off", piece.eager_why, 0.0)
        elif backend == "eager":
            why = "asked for by eager_pieces" if self.config.backend != "eager" else "backend=eager"
            made = CompiledPiece(eager.compile_piece(piece), "eager", "off", why, 0.0)
        elif backend == "aot_eager":
            call, mutates_inputs = aot_eager.compile_piece(piece)
            made = CompiledPiece(call, backend, "off", "backend=aot_eager", 0.0, mutates_inputs=mutates_inputs)
        else:
            made = self._with_inductor(piece, region)
        return replace(made, seconds=time.perf_counter() - started, notes=self._kernels_of_ops(piece))

    def _kernels_of_ops(self, piece: Piece) -> tuple[str, ...]:
        """Sees to it that onegraph's own ops in the piece have their kernels; why they haven't, where that is so."""
        return install_op_kernels(self.target, self.store).notes if uses_own_ops(piece.graph_module) else ()

    def _with_inductor(self, piece: Piece, region: Region | None) -> CompiledPiece:
        options = {**self.target.compiler_options(), **SAME_AS_EAGER, **self.config.inductor_compile_config}
        key = piece_key(piece, region, self.target, options)
        if isinstance(key, Unkeyable):
            return self._fresh(piece, None, options, f"can't be stored: {key.reason}")
        if self.store is None:
            return self._fresh(piece, key, options, "the compile cache is off")
        with self.store.lock(key.digest):
            hit = self._load(piece, key)
            if hit is not None:
                counters.add("store_hits")
                return hit
            counters.add("store_misses")
            return self._fresh(piece, key, options, "no artifact has this key")

    def _load(self, piece: Piece, key: Key) -> CompiledPiece | None:
        assert self.store is not None
        stored = self.store.read(key.digest)
        if stored is None:
            return None
        manifest = stored.manifest
        shape_env, sizes = piece.fake_mode.shape_env, shapes.backed_inputs(piece.fake_inputs)
        if manifest.guards is not None and not shapes.holds(shape_env, manifest.guards, sizes):
            return None
        try:
            call = inductor.load_artifact(stored.files, manifest.aliases, self.target)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with stored code, compiling anew mends it
            self.store.quarantine(key.digest, f"it can't be loaded: {type(error).__name__}: {error}")
            return None
        trace_text(f"piece_{piece.index}_output_code", lambda: stored.files[inductor.WRAPPER].read_text())
        return CompiledPiece(
            call=call,
            backend="inductor",
            store="hit",
            why=f"same graph, options and machine as on {manifest.created}",
            seconds=0.0,
            key=key.digest,
            mutates_inputs=manifest.mutates_inputs,
            constraints=manifest.constraints,
        )

    def _fresh(self, piece: Piece, key: Key | None, options: dict[str, Any], why: str) -> CompiledPiece:
        compiled = inductor.compile_artifact(piece, key, self.target, options)
        made, shape_env = compiled.made, piece.fake_mode.shape_env
        constraints = self.check_sizes([*compiled.conditions, *shapes.conditions(shape_env)])
        digest = None if key is None else key.digest
        if isinstance(made, inductor.InProcess):
            why = f"can't be stored: {made.reason}"
            return CompiledPiece(made.call, "inductor", "off", why, 0.0, digest, made.mutates_inputs, constraints)
        artifact = replace(
            made,
            constraints=constraints,
            guards=shapes.guards_expression(shape_env, shapes.backed_inputs(piece.fake_inputs)),
        )
        trace_text(f"piece_{piece.index}_output_code", lambda: artifact.files[inductor.WRAPPER].decode())
        call, stored = self._write_and_load(artifact, key)
        status = "miss" if stored else "off"
        return CompiledPiece(call, "inductor", status, why, 0.0, digest, made.mutates_inputs, constraints)

    def _write_and_load(self, artifact: Artifact, key: Key | None) -> tuple[PieceCallable, bool]:
        if self.store is not None and key is not None:
            try:
                files = self.store.write(artifact).files
                return inductor.load_artifact(files, artifact.aliases, self.target), True
            except OSError as error:
                log.warning("the artifact couldn't be kept in %s: %s", self.store.root, error)
        with tempfile.TemporaryDirectory(prefix="onegraph-artifact-") as folder:
            files = {name: Path(folder) / name for name in artifact.files}
            for name, contents in artifact.files.items():
                files[name].write_bytes(contents)
            return inductor.load_artifact(files, artifact.aliases, self.target), False


def _identity(piece: Piece, dims: Mapping[str, str]) -> Identity | None:
    """Equal for pieces that one artifact is right for; None for a piece that can't be compared with others."""
    text = graph_text(piece.graph_module, piece.fake_mode.shape_env)
    if isinstance(text, Unkeyable):
        return None
    sizes = [size for value in piece.fake_inputs for size in (getattr(value, "shape", None) or [value])]
    symbols = dict.fromkeys(name for size in sizes for name in sorted(shapes.symbol_names(size)))
    return text, tuple(dims.get(symbol) for symbol in symbols)


def _nearest(identity: Identity, known: Mapping[Identity, int]) -> str | None:
    """The earlier piece that shares most lines with this one, and the first line that differs."""
    lines = identity[0].splitlines()
    best = max(known, key=lambda other: len(set(lines) & set(other[0].splitlines())), default=None)
    if best is None:
        return None
    for line, other in itertools.zip_longest(lines, best[0].splitlines()):
        if line != other:
            return f"piece {known[best]}: {line or 'its end'} instead of {other or 'its end'}"
    return f"piece {known[best]}: the dims that its sizes stand for"
