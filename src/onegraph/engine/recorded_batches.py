"""Batches that are recorded: at which sizes, which batch is padded to one, and what stands in the padding.

Takes: the cudagraph mode, the sizes asked for, the engine's limits. Gives: a `Decision` for each batch, and its arrays
padded to the decision's size, with what PADDING says. A padding row is token 0 at position 0, its slot -1, so that
nothing is written for it into the KV cache, and it belongs to no request; a padding request begins where the last one
ends, so it has no tokens; a padding row of the logits repeats row 0.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onegraph.config.compilation import CUDAGraphMode
from onegraph.cudagraph.padding import fill_padding
from onegraph.cudagraph.sizes import Decision, Dispatcher, SizeChoice
from onegraph.errors import RecordingError
from onegraph.ir.padding import PaddedSizes, Policy, StepInput, padded_sizes
from onegraph.ir.recording import RecordedSize, RecordingPlan, Uncovered

NO_SLOT = -1

_OF_TOKENS: Mapping[str, Policy] = {"input_ids": "zero", "positions": "zero", "slot_mapping": NO_SLOT}
_OF_REQUESTS: Mapping[str, Policy] = {
    "query_start_loc": "last",
    "seq_lens": "zero",
    "block_tables": "zero",
    "logits_indices": "zero",
}
PADDING: Mapping[str, Policy] = {**_OF_TOKENS, **_OF_REQUESTS}
"""What stands in the padding of the flat model's inputs; those of requests are padded where the whole call is
recorded."""

Arrays = dict[str, "np.ndarray[Any, Any]"]
"""The flat model's inputs by name."""


@dataclass(frozen=True, slots=True)
class RecordedBatches:
    """`full` and `piecewise` are the sizes that are recorded in whole, and in pieces."""

    mode: CUDAGraphMode
    full: tuple[int, ...]
    piecewise: tuple[int, ...]
    max_num_seqs: int
    max_blocks_per_seq: int

    @classmethod
    def planned(
        cls,
        mode: CUDAGraphMode,
        choice: SizeChoice,
        *,
        max_num_tokens: int,
        max_num_seqs: int,
        max_blocks: int,
        bytes_per_row: float = 0.0,
    ) -> "RecordedBatches":
        """The sizes for a mode; `bytes_per_row` is what a recording takes for each of its tokens.

        Raises ConfigError for an asked size that no batch of the mode has, and as `SizeChoice.sizes`.
        """
        in_whole = mode in (CUDAGraphMode.FULL, CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY)
        in_pieces = mode in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL_AND_PIECEWISE)
        decodes = min(max_num_tokens, max_num_seqs)
        most_whole = max_num_tokens if mode is CUDAGraphMode.FULL else decodes
        most = max(max_num_tokens if in_pieces else 1, most_whole if in_whole else 1)
        sizes = choice.sizes(1, most, bytes_per_row * (2 if in_pieces and in_whole else 1))
        return cls(
            mode=mode,
            full=tuple(size for size in sizes if size <= most_whole) if in_whole else (),
            piecewise=sizes if in_pieces else (),
            max_num_seqs=max_num_seqs,
            max_blocks_per_seq=max_blocks,
        )

    @property
    def largest(self) -> Decision:
        """The batch with the most tokens."""
        full, piecewise = max(self.full, default=0), max(self.piecewise, default=0)
        mode = CUDAGraphMode.FULL if full >= piecewise else CUDAGraphMode.PIECEWISE
        return Decision(mode, max(full, piecewise), "exact")

    def plan(
        self, choice: SizeChoice, *, lazily_at: int | None, first: RecordedSize | None, max_num_tokens: int
    ) -> RecordingPlan:
        """What is told before the batches are recorded; `first` is the largest, which tells what others will cost."""
        modes = {CUDAGraphMode.FULL: self.full, CUDAGraphMode.PIECEWISE: self.piecewise}
        sizes = {mode: found for mode, found in modes.items() if found}
        return RecordingPlan(sizes, str(choice), lazily_at, first, self.uncovered(max_num_tokens), choice.traffic)

    def dispatcher(self) -> Dispatcher:
        """What decides for a batch."""
        return Dispatcher(self.mode, self.full, self.piecewise)

    def uncovered(self, max_num_tokens: int) -> tuple[Uncovered, ...]:
        """The batches that run without a recording, by their numbers of tokens."""
        found = []
        if self.full and not self.piecewise and self.mode is not CUDAGraphMode.FULL:
            found.append(Uncovered(2, max_num_tokens, "a request of the batch has several new tokens"))
        largest = max((*self.full, *self.piecewise), default=0)
        if largest < max_num_tokens:
            found.append(Uncovered(largest + 1, max_num_tokens, "more tokens than the largest recorded batch"))
        return tuple(found)

    def padding(self, decision: Decision) -> Arrays:
        """A batch of padding alone."""
        nothing = np.zeros(0, dtype=np.int64)
        empty = dict.fromkeys(("input_ids", "positions", "slot_mapping", "seq_lens", "logits_indices"), nothing)
        tables = np.zeros((0, self.max_blocks_per_seq), dtype=np.int32)
        arrays: Arrays = {**empty, "query_start_loc": np.zeros(1, dtype=np.int64), "block_tables": tables}
        if decision.mode is CUDAGraphMode.PIECEWISE:  # its splitting ops want a request
            arrays |= {
                "query_start_loc": np.zeros(2, dtype=np.int64),
                "seq_lens": np.zeros(1, dtype=np.int64),
                "block_tables": np.zeros((1, 1), dtype=np.int32),
                "logits_indices": np.zeros(1, dtype=np.int64),
            }
        return self.padded(arrays, decision)

    def padded(self, arrays: Arrays, decision: Decision) -> Arrays:
        """The arrays with padding up to the decision's size; `block_tables` are [R, M] with M of the longest."""
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_OF_TOKENS, (decision.size,))
        if decision.mode is CUDAGraphMode.FULL:
            num_reqs = min(decision.size, self.max_num_seqs)
            shapes |= dict.fromkeys(_OF_REQUESTS, (num_reqs,))
            shapes |= {"query_start_loc": (num_reqs + 1,), "block_tables": (num_reqs, self.max_blocks_per_seq)}
        return arrays | {name: _extended(arrays[name], shape, PADDING[name]) for name, shape in shapes.items()}


def why_unrecordable(error: Exception) -> str:
    """In words, for recordings that are made if they can be."""
    return error.message if isinstance(error, RecordingError) else repr(error)


def shown_padding(
    inputs: Iterable[StepInput], sizes: Mapping[CUDAGraphMode, Iterable[int]]
) -> tuple[tuple[StepInput, ...], tuple[PaddedSizes, ...]]:
    """The model's inputs with what stands in their padding, and which batches are padded to these, by their tokens."""
    policies = {} if not sizes else PADDING if CUDAGraphMode.FULL in sizes else _OF_TOKENS
    named = tuple(replace(one, padding=policies.get(one.name)) for one in inputs)
    return named, tuple(gap for mode, found in sizes.items() for gap in padded_sizes(found, 1, mode))


def _extended(array: "np.ndarray[Any, Any]", shape: tuple[int, ...], policy: Policy) -> "np.ndarray[Any, Any]":
    if array.shape == shape:
        return array
    whole = np.empty(shape, dtype=array.dtype)
    whole[tuple(map(slice, array.shape))] = array
    fill_padding(whole, dict(enumerate(array.shape)), policy)
    return whole
