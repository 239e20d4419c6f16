"""From pieces to something that runs: by the configured backend, and with Inductor through the store.

Takes pieces and a region; gives a CompiledPiece for each, with the reason why it was compiled or loaded. Pieces that
are equal share one. A fresh artifact is written and then loaded from its files, so that cold and warm starts run the
same code.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onegraph.build_trace import GraphTexts
from onegraph.compilers import aot_eager, eager, inductor, own_ops
from onegraph.compilers.autotuning import Autotuning
from onegraph.compilers.key import piece_key
from onegraph.compilers.loading import AUTOTUNED, WRAPPER, LoadingFacts, load_artifact
from onegraph.compilers.machine import machine_factors
from onegraph.compilers.shared_build import SharedBuild
from onegraph.config.resolve import ResolvedConfig
from onegraph.counters import counters
from onegraph.edited_pieces import LoadedCode, load_unpacked
from onegraph.errors import ConfigError
from onegraph.ir.artifact import Artifact, CompiledPiece
from onegraph.ir.autotune import TunedChoice
from onegraph.ir.key import Key, Unkeyable
from onegraph.ir.ledger import ShapeEntry
from onegraph.ir.piece import Piece
from onegraph.ir.region import Region
from onegraph.ir.target import Target
from onegraph.kept_artifacts import load_kept
from onegraph.linear_kernels import choose_linear_kernels
from onegraph.log import get_logger
from onegraph.look_up import as_on, guards_hold, looked_up
from onegraph.narrowing import specialised_piece
from onegraph.op_kernels import install_op_kernels, uses_own_ops
from onegraph.store.choices import Choices
from onegraph.store.lookup import Lookup
from onegraph.store.store import Store, outside_the_store
from onegraph.timeline import timeline
from onegraph.torch_compat import autotune, shapes
from onegraph.torch_compat.graph_text import graph_text
from onegraph.torch_compat.specialised_sizes import NotSpecialisedError

log = get_logger(__name__)

SAME_AS_EAGER = {"fallback_random": True}
"""Options of Inductor without which its result differs from eager: random ops would draw from another stream."""

PIECES_OF_A_BUILD = 8
"""One run of the compiler for three pieces takes 2.8 CPU seconds, three runs take 7.6: `python -m bench.one_build`."""

Identity = tuple[str, tuple[str | None, ...]]
"""A piece's canonical text, and the dims that its inputs' sizes stand for, in order."""


@dataclass(frozen=True)
class PieceCompiler:
    """`store` None means that nothing is read or written.

    `check_sizes(conditions, region)` judges what compiling came to assume about sizes, and raises ConstraintError for
    what the region doesn't imply: before anything is written. `texts` is shown the code.
    """

    config: ResolvedConfig
    target: Target
    store: Store | None
    check_sizes: Callable[[list[shapes.RawCondition], Region | None], tuple[ShapeEntry, ...]]
    texts: GraphTexts

    def compile_all(
        self,
        pieces: Sequence[Piece],
        regions: Sequence[Region | None],
        general: Region | None,
        dims: Mapping[str, str],
        progress: Callable[[int, int], None],
    ) -> tuple[tuple[CompiledPiece, ...], ...]:
        """For each region its pieces. Each that differs from all before it is compiled, once for a region.

        `general` is the region for which the pieces were captured; a piece that can't be made for fewer sizes, or
        has no size that the region narrows, has one artifact for all regions. `dims` names the dim that a symbol
        stands for. `progress(done, total)` counts the distinct pieces of all regions. A region of None is that of a
        graph without declared dims. Needs `torch_compat.dynamo.compile_scope`. Raises CompileError, ConfigError for
        `eager_pieces` that there aren't, ConstraintError.
        """
        self._refuse_unknown_pieces(pieces)
        notes = {piece.index: self._kernels_of_ops(piece) for piece in pieces}  # before any piece's lock is held
        identities = [None if self._runs_eager(piece) else _identity(piece, dims) for piece in pieces]
        for_all: dict[int, _Compiling | CompiledPiece] = {}
        begun: list[list[_Compiling | CompiledPiece | int]] = []
        for piece in pieces:
            self._show(piece, general)
        compiled = [one for piece, one in zip(pieces, identities, strict=True) if piece.kind == "compiled"]
        total = (len({*compiled} - {None}) + compiled.count(None)) * len(regions)
        done = itertools.count()
        with _Builds(self.target) as builds:
            for region in regions:
                known: dict[Identity, int] = {}
                row: list[_Compiling | CompiledPiece | int] = []
                for piece, identity in zip(pieces, identities, strict=True):
                    twin = None if identity is None else known.get(identity)
                    if twin is not None:
                        row.append(twin)
                        continue
                    if piece.kind == "compiled":
                        progress(next(done), total)
                    one = self._begin_for_region(piece, region, general, dims, for_all, notes, builds)
                    row.append(one)
                    if identity is not None:
                        known[identity] = piece.index
                begun.append(row)
            if isinstance(self.store, Lookup):
                self.store.recompile()
            return tuple(tuple(self._finished(row, pieces, identities, notes)) for row in begun)

    def _finished(
        self,
        row: Sequence[_Compiling | CompiledPiece | int],
        pieces: Sequence[Piece],
        identities: Sequence[Identity | None],
        notes: Mapping[int, tuple[str, ...]],
    ) -> Iterator[CompiledPiece]:
        """The pieces of a region; a number stands for the earlier piece that is the same."""
        made: list[CompiledPiece] = []
        known: dict[Identity, int] = {}
        for piece, identity, begun in zip(pieces, identities, row, strict=True):
            if isinstance(begun, int):
                made.append(replace(made[begun], same_as=begun, seconds=0.0, differs_from=None))
                continue
            one = begun if isinstance(begun, CompiledPiece) else begun.finish()
            differs_from = None if identity is None else _nearest(identity, known)
            if identity is not None:
                known[identity] = piece.index
            made.append(replace(one, differs_from=differs_from, notes=(*one.notes, *notes[piece.index])))
        yield from made

    def _runs_eager(self, piece: Piece) -> bool:
        return piece.kind == "splitting_op" or piece.index in self.config.eager_pieces

    def _begin_for_region(
        self,
        piece: Piece,
        region: Region | None,
        general: Region | None,
        dims: Mapping[str, str],
        for_all: dict[int, _Compiling | CompiledPiece],
        notes: dict[int, tuple[str, ...]],
        builds: _Builds,
    ) -> _Compiling | CompiledPiece:
        narrower = piece
        if (
            region is not None
            and general is not None
            and region != general
            and not self._runs_eager(piece)
            and (self.config.backend != "eager" or isinstance(self.store, Lookup))
        ):
            try:
                narrower = specialised_piece(piece, region, general, dims)
            except NotSpecialisedError as error:
                where = region.condition(general)
                notes[piece.index] += (f"piece {piece.index} has no artifact of its own where {where}: {error}",)
        if narrower is not piece:
            self._show(narrower, region)
            return self._begin(narrower, region, builds)
        if piece.index not in for_all:
            made = self._begin(piece, general, builds)
            for_all[piece.index] = made
        return for_all[piece.index]

    def _refuse_unknown_pieces(self, pieces: Sequence[Piece]) -> None:
        for index in self.config.eager_pieces:
            if index >= len(pieces):
                raise ConfigError(
                    f"eager_pieces has {index}, and the graph's pieces are 0..{len(pieces) - 1}",
                    where="eager_pieces",
                    hint="`onegraph explain` lists them",
                )

    def _begin(self, piece: Piece, region: Region | None, builds: _Builds) -> _Compiling | CompiledPiece:
        started = time.perf_counter()
        if piece.kind == "splitting_op":
            call = own_ops.compile_piece(piece, self.target) or eager.compile_piece(piece)
            made = CompiledPiece(call, "eager", "off", "a splitting op runs as it is", 0.0)
        elif piece.index in self.config.eager_pieces and self.config.backend != "eager":
            made = CompiledPiece(eager.compile_piece(piece), "eager", "off", "asked for by eager_pieces", 0.0)
        elif self.config.backend == "eager":
            made = CompiledPiece(eager.compile_piece(piece), "eager", "off", "backend=eager", 0.0)
        elif piece.eager_why:
            made = CompiledPiece(eager.compile_piece(piece), "eager", "off", piece.eager_why, 0.0)
        elif self.config.backend == "aot_eager":
            call, mutates_inputs = aot_eager.compile_piece(piece)
            made = CompiledPiece(call, "aot_eager", "off", "backend=aot_eager", 0.0, mutates_inputs=mutates_inputs)
        else:
            return self._begin_with_inductor(piece, region, builds, started)
        return replace(made, seconds=time.perf_counter() - started)

    def _kernels_of_ops(self, piece: Piece) -> tuple[str, ...]:
        """Sees to it that onegraph's own ops in the piece have their kernels; which ones, or why they haven't."""
        if isinstance(self.store, Lookup) or not uses_own_ops(piece.graph_module):
            return ()
        installed = install_op_kernels(self.target, self.store)
        return (*installed.notes, *map(str, choose_linear_kernels(piece.graph_module, self.target, self.store)))

    def _begin_with_inductor(
        self, piece: Piece, region: Region | None, builds: _Builds, started: float
    ) -> _Compiling | CompiledPiece:
        options, tuning = self._options()
        key = piece_key(piece, region, self.target, options)
        if isinstance(self.store, Lookup):
            return looked_up(piece, key, self.store, self.target, options, tuning)
        with contextlib.ExitStack() as held:
            if isinstance(key, Unkeyable):
                why = f"can't be stored: {key.reason}"
            elif self.store is None:
                why = "the compile cache is off"
            else:
                held.enter_context(self.store.lock(key.digest, before_waiting=builds.finish_all))
                artifact_key = key if tuning is None else tuning.recorded_key(key)
                hit = None if artifact_key is None else self._load(piece, region, artifact_key)
                if hit is not None:
                    counters.add("store_hits")
                    return replace(hit, seconds=time.perf_counter() - started)
                counters.add("store_misses")
                why = self.store.why_missed(artifact_key or key)
                log.info("piece %d is compiled: %s", piece.index, why)
            compilation = inductor.Compilation(piece, self.target, options, tuning)
            if tuning is not None and not isinstance(key, Unkeyable):
                key = tuning.settled_key(key)
            shape_env = piece.fake_mode.shape_env
            begun = _Compiling(
                compiler=self,
                piece=piece,
                region=region,
                key=None if isinstance(key, Unkeyable) else key,
                why=why,
                compilation=compilation,
                constraints=self.check_sizes([*compilation.conditions, *shapes.conditions(shape_env)], region),
                guards=shapes.guards_expression(shape_env, shapes.backed_inputs(piece.fake_inputs)),
                started=started,
                held=held.pop_all(),
                builds=builds,
            )
        return builds.add(begun)

    def _show(self, piece: Piece, region: Region | None) -> None:
        """A store that is only asked may want to know what the compiler is handed; see `onegraph.audit`."""
        if isinstance(self.store, Lookup):
            options, _ = self._options()
            key = functools.partial(piece_key, piece, region, self.target, options)
            self.store.hand(piece, region, self.target.name, options, key)

    def _options(self) -> tuple[dict[str, Any], Autotuning | None]:
        """Inductor's options, and who chooses kernels under them: nobody where nothing is measured."""
        options = {**self.target.compiler_options(), **SAME_AS_EAGER, **self.config.inductor_compile_config}
        mode = self.config.autotune
        if mode == "off" and self.config.asked("autotune"):
            options = {**options, **autotune.OFF}
        if not autotune.tunes(options):
            return options, None
        if not self.target.runs:
            raise ConfigError(
                "kernels that are chosen by measuring can't be chosen where none are run",
                where="autotune",
                hint="leave autotune, max_autotune and TORCHINDUCTOR_MAX_AUTOTUNE out, or start without an artifact",
            )
        records = None if self.store is None else Choices(self.store)
        mode = "record" if mode == "off" else mode  # torch's own configuration asks for it
        return options, Autotuning(mode, machine_factors(self.target), records)

    def _load(self, piece: Piece, region: Region | None, key: Key) -> CompiledPiece | None:
        assert self.store is not None
        found = load_kept(
            self.store,
            key.digest,
            lambda stored: self._loaded(stored.files, stored.manifest, piece, key),
            lambda manifest: guards_hold(piece, manifest.guards),
        )
        if found is None:
            return None
        loaded, stored = found
        manifest = stored.manifest
        self.texts.code(piece.index, region, stored.files[WRAPPER].read_text)
        return CompiledPiece(
            call=loaded.call,
            backend="inductor",
            store="hit",
            why=loaded.why or as_on(manifest.created),
            seconds=0.0,
            key=key.digest,
            mutates_inputs=manifest.mutates_inputs,
            constraints=manifest.constraints,
            notes=loaded.notes,
            autotuned=tuple(map(TunedChoice.from_dict, manifest.facts.get(AUTOTUNED, ()))),
            edited=loaded.edits is not None,
        )

    def finished(self, begun: _Compiling) -> CompiledPiece:
        """What the compile gives when its kernels are built; they are kept in the store, and loaded from there."""
        assert begun.build is not None
        made = begun.compilation.finish(begun.key, begun.build.files_for(begun.compilation))
        if isinstance(made, inductor.InProcess):
            loaded, store, why = LoadedCode(made.call), "off", f"can't be stored: {made.reason}"
        else:
            artifact = replace(made, constraints=begun.constraints, guards=begun.guards)
            self.texts.code(begun.piece.index, begun.region, artifact.files[WRAPPER].decode, is_logged=True)
            loaded, stored = self._write_and_load(artifact, begun.piece, begun.key)
            store, why = "miss" if stored else "off", begun.why
        unpacked = (f"piece {begun.piece.index} isn't unpacked: {why}",) if self._unpacks and store == "off" else ()
        return CompiledPiece(
            call=loaded.call,
            backend="inductor",
            store=store,
            why=f"{why}; {loaded.why}" if loaded.why else why,
            seconds=0.0,
            key=None if begun.key is None else begun.key.digest,
            mutates_inputs=made.mutates_inputs,
            constraints=begun.constraints,
            notes=(*loaded.notes, *unpacked),
            autotuned=begun.compilation.autotuned,
            edited=loaded.edits is not None,
        )

    def _write_and_load(self, artifact: Artifact, piece: Piece, key: Key | None) -> tuple[LoadedCode, bool]:
        if self.store is not None and key is not None:
            try:
                files = self.store.write(artifact).files
                return self._loaded(files, artifact, piece, key), True
            except OSError as error:
                log.warning("the artifact couldn't be kept in %s: %s", self.store.root, error)
        with outside_the_store(artifact.files) as files:
            return LoadedCode(load_artifact(files, artifact, self.target)), False

    @property
    def _unpacks(self) -> bool:
        return self.config.compile_cache_save_format == "unpacked"

    def _loaded(self, files: Mapping[str, Path], facts: LoadingFacts, piece: Piece, key: Key) -> LoadedCode:
        if self.store is None or not self._unpacks:
            return LoadedCode(load_artifact(files, facts, self.target))
        return load_unpacked(files, facts, self.target, self.store.root, key.digest, piece.index, key.factors)


@dataclass
class _Compiling:
    """A piece whose kernels are being built, or will be; `held` has the key's lock until it is finished or given up."""

    compiler: PieceCompiler
    piece: Piece
    region: Region | None
    key: Key | None
    why: str
    compilation: inductor.Compilation
    constraints: tuple[ShapeEntry, ...]
    guards: str | None
    started: float
    held: contextlib.ExitStack
    builds: _Builds
    build: SharedBuild | None = None
    made: CompiledPiece | None = None

    def finish(self) -> CompiledPiece:
        """Waits for the kernels, the first time. Raises CompileError, ConstraintError."""
        if self.made is None:
            if self.build is None:
                self.builds.start()
            with self.held, timeline.stage(f"piece {self.piece.index}", "the rest of its build, and loading"):
                made = self.compiler.finished(self)
            self.made = replace(made, seconds=time.perf_counter() - self.started)
        return self.made


class _Builds:
    """The compiles under way: their kernels are built by one run of the compiler for up to `PIECES_OF_A_BUILD`.

    At most one run for each core beside the caller's; what is left at the end is given up.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._waiting: list[_Compiling] = []
        self._running: list[list[_Compiling]] = []

    def add(self, one: _Compiling) -> _Compiling:
        self._waiting.append(one)
        if len(self._waiting) == PIECES_OF_A_BUILD:
            self.start()
        return one

    def start(self) -> None:
        """Begins to build what waits for it."""
        if not self._waiting:
            return
        group, self._waiting = self._waiting, []
        self._running.append(group)
        build = SharedBuild(self._target, [one.compilation for one in group])
        for one in group:
            one.build = build
        while len(self._running) > max(len(os.sched_getaffinity(0)) - 1, 1):
            self._finish_oldest()

    def finish_all(self) -> None:
        self.start()
        while self._running:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        for one in self._running.pop(0):
            one.finish()

    def __enter__(self) -> _Builds:
        return self

    def __exit__(self, *error: object) -> None:
        for one in [*itertools.chain(*self._running), *self._waiting]:
            if one.build is not None:
                one.build.cancel()
            one.held.close()


def _identity(piece: Piece, dims: Mapping[str, str]) -> Identity | None:
    """Equal for pieces that one artifact is right for; None for a piece that can't be compared with others."""
    shape_env = piece.fake_mode.shape_env
    text = graph_text(piece.graph_module, shape_env)
    if isinstance(text, Unkeyable):
        return None
    symbols = dict.fromkeys(
        name for value in piece.fake_inputs for name in sorted(shapes.symbols_of([value], shape_env))
    )
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
