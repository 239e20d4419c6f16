"""What a piece is called with when it runs alone: as a step has it, drawn like that, or saved by an earlier run.

Weights are the model's in any case. Memory that the piece writes (a KV cache) is copied for each run; all else is only
read, and shared by the runs.
"""

from __future__ import annotations

import io
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from onegraph.debug.pieces import AskedPiece, PieceModel, ReachedPiece
from onegraph.errors import ArtifactError, ConfigError
from onegraph.ir.fx_nodes import changed_arguments, storage_of, storage_of_value
from onegraph.store.files import put
from onegraph.torch_compat.fake_runs import stands_for

INPUTS = "inputs.pt"
"""In a piece's unpacked folder."""
PROMPT, SIZE = "def ", 16
"""Whose step's inputs are taken, and how many tokens random ones are for, where nobody says."""
_MOST_SAVED_BYTES = 1 << 30


@dataclass(frozen=True)
class PieceInputs:
    """The piece's inputs in order; `what` has for each of them in words what it is, and `source` where all are from.

    `written` are those, by index, whose memory the piece may change.
    """

    values: tuple[Any, ...]
    names: tuple[str, ...]
    what: tuple[str, ...]
    is_weight: tuple[bool, ...]
    written: frozenset[int]
    sizes: dict[str, int]
    source: str

    def fresh(self) -> list[Any]:
        """For one run."""
        return [copy_of(one) if i in self.written else one for i, one in enumerate(self.values)]

    def to_dict(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "what": what,
                "dtype": str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else None,
                "shape": list(value.shape) if isinstance(value, torch.Tensor) else None,
                "written": index in self.written,
            }
            for index, (name, what, value) in enumerate(zip(self.names, self.what, self.values, strict=True))
        ]


@dataclass(frozen=True)
class WantedInputs:
    """What was asked for: `kind` is `prompt`, `random` or `saved`; None and empty where nobody said.

    `prompts` and `step` are for the first, `size` (tokens) and `seed` for the second.
    """

    kind: str | None = None
    prompts: tuple[str, ...] = ()
    step: int | None = None
    size: int | None = None
    seed: int = 0


def reached_with(model: PieceModel, asked: AskedPiece, wanted: WantedInputs) -> tuple[ReachedPiece, PieceInputs]:
    """The piece as a step reaches it, and the inputs that are wanted.

    Without a kind it follows from the rest; where that says nothing, saved inputs are taken if there are any, then
    those of a step. Raises ConfigError for saved ones that there aren't, and what `reach` raises.
    """
    follows = "random" if wanted.size else "prompt" if wanted.prompts or wanted.step else None
    kind, tokenizer = wanted.kind or follows, model.started.engine.text.tokenizer
    if kind in (None, "saved"):
        folders = map(model.folder, model.keys(asked.index) if asked.key is None else [asked.key])
        kept = next((one for folder in folders if folder is not None and (one := saved(folder))), None)
        if kept is not None:
            size = kept.sizes.get(model.dim.name, model.size_for(asked, 2))
            if not model.dim.min <= size <= model.dim.max:
                raise kept.refused(f"they have {size} tokens, and a step {model.dim.min}..{model.dim.max}")
            reached = model.reach(asked, model.random_prompts(size, wanted.seed), 1)
            return reached, kept.beside(of_step(reached, ""), reached.piece.fake_inputs)
        if kind == "saved":
            raise ConfigError(
                f"no inputs of piece {asked.index} are saved",
                where="--inputs",
                hint="run it once with --save and other inputs, which keeps them",
            )
    if kind == "random" or (kind is None and tokenizer is None):
        size = wanted.size or model.size_for(asked, SIZE)
        reached = model.reach(asked, model.random_prompts(size, wanted.seed), 1)
        if (reached_size := reached.sizes.get(model.dim.name, size)) != size:
            raise ConfigError(
                f"the step has {reached_size} tokens, and not {size}: the KV cache holds no more requests",
                where="--size",
                hint="give a larger --num-kv-blocks, or a smaller size",
            )
        source = f"random, like those of a step of {size} tokens (seed {wanted.seed})"
        return reached, drawn(of_step(reached, source), wanted.seed)
    prompts, step = wanted.prompts or (PROMPT,), wanted.step or 1
    reached = model.reach(asked, [model.started.engine.text.encode(prompt) for prompt in prompts], step)
    several = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
    return reached, of_step(reached, f"step {step} of {prompts[0]!r}{several}")


def of_step(reached: ReachedPiece, source: str) -> PieceInputs:
    """As the step has them."""
    weights = reached.weights
    names = reached.piece.inputs
    values = reached.inputs
    return PieceInputs(
        values=values,
        names=names,
        what=tuple(weights.get(name) or _described(value) for name, value in zip(names, values, strict=True)),
        is_weight=tuple(name in weights for name in names),
        written=frozenset(_written(reached)),
        sizes=reached.sizes,
        source=source,
    )


def drawn(like: PieceInputs, seed: int) -> PieceInputs:
    """Floating numbers drawn from a normal distribution with the mean and the deviation that each has in the step.

    Weights stay the model's. Whole numbers (tokens, positions, blocks, slots) and sizes stay the step's: any others
    might point outside of a table.
    """
    generator = torch.Generator().manual_seed(seed)
    values, what = list(like.values), list(like.what)
    for index, value in enumerate(values):
        if like.is_weight[index] or not isinstance(value, torch.Tensor):
            continue
        if not value.is_floating_point():
            what[index] += ", as in the step"
            continue
        finite = value[value.isfinite()].double()
        mean = float(finite.mean()) if finite.numel() else 0.0
        deviation = float(finite.std(correction=0)) if finite.numel() else 0.0
        deviation = deviation or 1.0
        made = copy_of(value)
        made.copy_(torch.randn(value.shape, generator=generator) * deviation + mean)
        values[index], what[index] = made, f"{what[index]}, drawn: mean {mean:.3g}, deviation {deviation:.3g}"
    return replace(like, values=tuple(values), what=tuple(what))


def save(inputs: PieceInputs, folder: Path) -> Path:
    """Writes all but the weights beside the piece's code. Raises ConfigError for too much, ArtifactError."""
    kept = [None if weight else value for weight, value in zip(inputs.is_weight, inputs.values, strict=True)]
    size = sum(one.numel() * one.itemsize for one in kept if isinstance(one, torch.Tensor))
    if size > _MOST_SAVED_BYTES:
        raise ConfigError(
            f"the inputs take {size / 2**20:.0f} MiB", where="--save", hint="fewer --num-kv-blocks make them smaller"
        )
    buffer = io.BytesIO()
    torch.save({"values": kept, "sizes": inputs.sizes, "source": inputs.source}, buffer)
    path = folder / INPUTS
    try:
        put(path, buffer.getvalue())
    except OSError as error:
        raise ArtifactError(f"the inputs can't be saved: {error.strerror or error}", where=str(path)) from error
    return path


@dataclass(frozen=True)
class SavedInputs:
    """What `save` wrote: `values` has None for each weight."""

    path: Path
    values: Sequence[Any]
    sizes: dict[str, int]
    source: str

    def beside(self, like: PieceInputs, fakes: Sequence[Any]) -> PieceInputs:
        """With the weights of a step. Raises ArtifactError where the piece, with inputs like `fakes`, takes others."""
        known: dict[Any, int] = {}
        fits = len(self.values) == len(like.values) and all(
            weight or stands_for(one, fake, known)
            for weight, one, fake in zip(like.is_weight, self.values, fakes, strict=True)
        )
        if not fits:
            raise self.refused("they are of another piece, or don't fit one another")
        values = tuple(
            other if weight else one
            for weight, one, other in zip(like.is_weight, self.values, like.values, strict=True)
        )
        what = (
            other if weight else _described(value)
            for weight, other, value in zip(like.is_weight, like.what, values, strict=True)
        )
        return replace(like, values=values, what=tuple(what), sizes=self.sizes, source=f"saved, {self.source}")

    def refused(self, why: str) -> ArtifactError:
        """The error for inputs that can't be taken."""
        hint = "delete the file, or --save anew"
        return ArtifactError(f"the saved inputs can't be used: {why}", where=str(self.path), hint=hint)


def saved(folder: Path) -> SavedInputs | None:
    """None where nothing is saved. Raises ArtifactError for a file that can't be read."""
    path = folder / INPUTS
    if not path.exists():
        return None
    try:
        found = torch.load(path, weights_only=True)
        sizes = {str(name): operator.index(size) for name, size in found["sizes"].items()}
        return SavedInputs(path, tuple(found["values"]), sizes, str(found["source"]))
    except Exception as error:
        raise ArtifactError(
            f"saved inputs can't be read: {type(error).__name__}: {error}",
            where=str(path),
            hint="delete the file, or --save anew",
        ) from error


def copy_of(value: Any) -> Any:
    """A copy of a tensor with the same sizes and strides, in memory of its own; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return value
    span = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    length = span + 1 if value.numel() else 0
    whole = value.as_strided((length,), (1,)).clone()
    return whole.as_strided(value.shape, value.stride(), 0)


def _written(reached: ReachedPiece) -> Iterator[int]:
    for piece in (reached.piece, reached.one.split.pieces[reached.index]):
        nodes = piece.graph_module.graph.nodes
        changed = {storage_of(one) for node in nodes for one in changed_arguments(node)} - {None}
        names = [
            name
            for name, fake in zip(piece.inputs, piece.fake_inputs, strict=True)
            if storage_of_value(fake) in changed
        ]
        yield from (index for index, name in enumerate(reached.piece.inputs) if name in names)


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value}"
    told = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    bad = int((~value.isfinite()).sum()) if value.is_floating_point() else 0
    return f"{told}, of which {bad} are NaN or infinite" if bad else told
