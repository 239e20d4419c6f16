"""A started model whose pieces can be had one by one: the piece that is asked for, its artifact, and its inputs.

Takes an EngineConfig; compiles or loads by the same stages as any start, but for the index, which has no graphs, and
for recordings. Gives a ReachedPiece: what a step of the engine calls a piece with, and all that is known of the piece.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from onegraph import api
from onegraph.config.engine import EngineConfig
from onegraph.engine.sampling_params import SamplingParams
from onegraph.engine.startup import start_engine, vocab_size
from onegraph.env import environment
from onegraph.errors import CompileError, ConfigError, OnegraphError, nearest
from onegraph.ir.artifact import CompiledPiece
from onegraph.ir.dims import DynamicDim
from onegraph.ir.piece import Piece
from onegraph.log import set_level
from onegraph.passes.as_captured import as_captured
from onegraph.plan.function import failed_piece, function_regions, replace_piece
from onegraph.specialised import Specialised
from onegraph.store.unpacked import Edits, edits, key_of, unpacked_folder
from onegraph.torch_compat import fake_runs

_LEAST_BLOCKS = 256
"""KV blocks where nobody asks for a number: copies of the cache are made, and no artifact depends on their number."""
_LEAST_PREFIX = 4
"""Digits of a key that name a piece."""


class _ReachedError(BaseException):
    """Ends a step where the piece would be called; no handler of errors of the model's shall see it."""

    def __init__(self, one: Specialised, part: int, inputs: list[Any]) -> None:
        self.one, self.part, self.inputs = one, part, inputs


@dataclass(frozen=True)
class AskedPiece:
    """A piece by its index; `key` is the artifact that was named, None for whichever serves the step's size."""

    index: int
    key: str | None = None


@dataclass(frozen=True)
class ChosenPiece:
    """A piece as it was made for some sizes: those of a part of a region."""

    one: Specialised
    part: int
    index: int

    @property
    def piece(self) -> Piece:
        """As it was compiled, after the passes."""
        return self.one.passed.pieces[self.index]

    @property
    def compiled(self) -> CompiledPiece:
        """What runs, and how it came about."""
        return self.one.pieces[self.part][self.index]

    @property
    def eager(self) -> Callable[[list[Any]], Any]:
        """The piece as it was captured, op by op, on the inputs that the compiled one takes."""
        return as_captured(self.one.split.pieces[self.index], self.piece, self.one.passed.merged)

    @property
    def weights(self) -> dict[str, str]:
        """The graph's names of those of its inputs that are weights, with what the module calls them."""
        captured = self.one.captured
        nodes = captured.graph_module.graph.find_nodes(op="placeholder")
        names = {node.name: weight.name for node, weight in zip(nodes, captured.weights, strict=False)}
        merged = {one.name: " + ".join(names[source] for source in one.sources) for one in self.one.passed.merged}
        return {**names, **merged}

    @property
    def condition(self) -> str | None:
        """The sizes that have this artifact; None for all."""
        return self.one.parts[self.part].condition(self.one.region)

    @property
    def shared_by(self) -> list[int]:
        """The pieces that run the same artifact, by index: itself alone where it has none."""
        key, pieces = self.compiled.key, self.one.pieces[self.part]
        return [i for i, one in enumerate(pieces) if i == self.index or (key is not None and one.key == key)]


@dataclass(frozen=True)
class ReachedPiece(ChosenPiece):
    """A piece in one step: `inputs` is what it is called with there."""

    inputs: tuple[Any, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The declared dims that its inputs show, with their sizes in the step."""
        found: dict[Any, int] = {}
        for fake, real in zip(self.piece.fake_inputs, self.inputs, strict=True):
            fake_runs.bind_symbols(fake, real, found)
        dims = self.one.captured.symbols
        return {dims[str(symbol)]: size for symbol, size in found.items() if str(symbol) in dims}


class PieceModel:
    """A model that is started to look at its pieces. Raises ConfigError where nothing of ours is compiled."""

    def __init__(self, config: EngineConfig, size: int | None = None) -> None:
        if config.artifact is not None:
            raise ConfigError(
                "an artifact's file has no graphs, and a piece is compared by its graph",
                where="--artifact",
                hint="leave it out: the compile cache makes up for it",
            )
        if config.num_kv_blocks is None:
            tokens = max(config.max_model_len or 0, 2 * (size or 0))
            config = replace(config, num_kv_blocks=max(_LEAST_BLOCKS, -(-tokens // config.block_size)))
        if (level := environment().log_level) != "WARNING":
            set_level(level)
        self._made: Sequence[Specialised] = ()
        self.started = start_engine(config, made_observer=self._observe)
        if not self._made:
            raise ConfigError(
                "with these settings nothing of ours is compiled, so there are no pieces",
                where="PIECE",
                hint="leave out --enforce-eager, -O0 and other modes than ONEGRAPH and DYNAMO_TRACE_ONCE",
            )

    def _observe(self, made: Sequence[Specialised]) -> None:
        self._made = made

    @property
    def root(self) -> Path | None:
        """The compile cache, where artifacts are unpacked there; else None."""
        settings, store = self.started.compiled.explain().config, api.open_store()
        is_unpacked = settings["compile_cache_save_format"]["value"] == "unpacked"
        return store.root if is_unpacked and store is not None else None

    @property
    def dim(self) -> DynamicDim:
        """The dim whose size is that of a step: the number of tokens."""
        return self._made[0].captured.dims[0]

    def folder(self, key: str | None) -> Path | None:
        """Where an artifact stands unpacked; None where it doesn't."""
        root = self.root
        return None if root is None or key is None else unpacked_folder(root, key)

    def edits(self, key: str | None) -> Edits | None:
        """What of it is edited; None for nothing."""
        root = self.root
        return None if root is None else next((one for one in edits(root) if one.key == key), None)

    def keys(self, index: int | None = None) -> dict[str, int]:
        """The artifacts of a piece, or of all, each with the first piece that has it."""
        found: dict[str, int] = {}
        most = max(len(one.split.pieces) for one in self._made)
        for number in range(most) if index is None else [index]:
            for one in self._variants(number):
                if one.compiled.key is not None:
                    found.setdefault(one.compiled.key, number)
        return found

    def find(self, word: str) -> AskedPiece:
        """The piece that a word names: its index, the beginning of its key, or its unpacked folder.

        Raises ConfigError for a piece that there isn't.
        """
        most = max(len(one.split.pieces) for one in self._made)
        if word.isdecimal() and int(word) < most:
            return AskedPiece(int(word))
        keys = self.keys()
        folder = Path(word)
        key = key_of(folder) if folder.is_dir() else None
        if key is not None and key not in keys:
            raise ConfigError(
                f"{word} was unpacked for another graph than this model has with these flags",
                where="PIECE",
                hint="give the flags that it was unpacked with; its original.json has the key's factors",
            )
        prefix = key or word.rpartition("-")[2].lower()
        if key is None and (len(prefix) < _LEAST_PREFIX or not set(prefix) <= set(string.hexdigits)):
            _refuse_unknown(word, most, keys)
        matching = [one for one in keys if one.startswith(prefix)]
        if len(matching) > 1:
            raise ConfigError(
                f"{len(matching)} artifacts have keys that begin with {prefix!r}: {', '.join(matching)}",
                where="PIECE",
                hint="give more digits",
            )
        if not matching:
            _refuse_unknown(word, most, keys)
        return AskedPiece(keys[matching[0]], matching[0])

    def choose(self, asked: AskedPiece) -> ChosenPiece:
        """The piece with the artifact that was named; else with that of the sizes that have none of their own."""
        found = [one for one in self._variants(asked.index) if asked.key in (None, one.compiled.key)]
        return found[-1]

    def size_for(self, asked: AskedPiece, otherwise: int) -> int:
        """A number of tokens that the artifact serves, where one was named."""
        ranges = self.choose(asked).one.parts[self.choose(asked).part].ranges if asked.key is not None else ()
        return min(max(otherwise, ranges[0][1]), ranges[0][2]) if ranges else min(otherwise, self.dim.max)

    def _variants(self, index: int) -> Iterator[ChosenPiece]:
        for one in self._made:
            for part, pieces in enumerate(one.pieces):
                if index < len(pieces):
                    yield ChosenPiece(one, part, index)

    def random_prompts(self, num_tokens: int, seed: int) -> list[list[int]]:
        """Prompts of random tokens that have so many together. Raises ConfigError for more than a step may have."""
        if not self.dim.min <= num_tokens <= self.dim.max:
            raise ConfigError(
                f"{num_tokens} tokens: a step has {self.dim.min}..{self.dim.max}",
                where="--size",
                hint="--max-num-batched-tokens sets the most",
            )
        generator = torch.Generator().manual_seed(seed)
        highest = vocab_size(self.started.model.config)
        tokens = torch.randint(0, highest, (num_tokens,), generator=generator).tolist()
        longest = max(self.started.limits.max_model_len - 1, 1)
        return [tokens[at : at + longest] for at in range(0, num_tokens, longest)]

    def reach(self, asked: AskedPiece, prompts: Sequence[Sequence[int]], step: int) -> ReachedPiece:
        """What the piece is called with when all of these prompts run, in the given step (from 1).

        All before it in that step runs as it does in any start. Raises ConfigError for a step that doesn't come, and
        where the artifact that was asked for isn't what runs there; and what the steps raise.
        """
        engine = self.started.engine
        params = SamplingParams(temperature=0, max_tokens=step, ignore_eos=True)
        try:
            for number, token_ids in enumerate(prompts):
                engine.add_request(f"debug {number}", list(token_ids), params)
            for _ in range(step - 1):
                engine.step()
            with self._tapped(asked.index):
                engine.step()
        except _ReachedError as reached:
            found = ReachedPiece(reached.one, reached.part, asked.index, tuple(reached.inputs))
        except OnegraphError:
            raise
        except Exception as error:
            raise _raised_before(asked.index, error) from error
        else:
            raise ConfigError(f"there is no step {step} in which piece {asked.index} runs", where="--step")
        finally:
            engine.reset()
        if asked.key not in (None, found.compiled.key):
            chosen, tokens = self.choose(asked), found.sizes.get(self.dim.name)
            raise ConfigError(
                f"the artifact {asked.key} serves {chosen.condition or 'other sizes'}; this step has {tokens} tokens",
                where="PIECE",
                hint=f"--inputs random --size {self.size_for(asked, 1)} runs it, or give the piece's index",
            )
        return found

    @contextmanager
    def _tapped(self, index: int) -> Iterator[None]:
        """Inside, a step ends where it would call the piece."""
        replaced = []
        for one in self._made:
            for part, calls in enumerate(function_regions(one.run)):
                if index < len(calls):
                    replaced.append((one.run, part, calls[index]))
                    replace_piece(one.run, part, index, functools.partial(_end_step, one, part))
        try:
            yield
        finally:
            for run, part, call in replaced:
                replace_piece(run, part, index, call)


def _end_step(one: Specialised, part: int, inputs: list[Any]) -> Any:
    raise _ReachedError(one, part, inputs)


def _raised_before(index: int, error: Exception) -> CompileError:
    piece = failed_piece(error)
    told = f"{type(error).__name__}: {str(error)[:200]}"
    if piece is None:
        return CompileError(f"the step raised {told}", where=f"before piece {index}", hint="--verbose shows where")
    return CompileError(
        f"piece {piece} raised {told}, so piece {index} isn't reached",
        where=f"piece {piece}",
        hint=f"`onegraph debug run {piece}` runs that one; -O.eager_pieces=[{piece}] has it run uncompiled",
    )


def _refuse_unknown(word: str, num_pieces: int, keys: dict[str, int]) -> NoReturn:
    near = nearest(word, [key[: max(len(word), _LEAST_PREFIX)] for key in keys]) if keys and len(word) > 2 else ""
    raise ConfigError(
        f"there is no piece {word!r}: the model's pieces are 0..{num_pieces - 1}, and `onegraph explain` lists them",
        where="PIECE",
        hint="give an index, the beginning of an artifact's key (`onegraph explain --json`), or the path of its "
        "unpacked folder" + (f"; {near}" if near.startswith("did") else ""),
    )
