"""Runs a batch: writes the model's flat inputs into fixed buffers and calls the compiled model.

Takes: a `Batch` whose sequences have their blocks. Gives: logits for the rows that somebody needs.
Keeps: the KV cache tensors and the input buffers, on one device, made once, in inference mode like every call.
`T` tokens of the batch, `R` sequences, `B` blocks of the longest, `S` rows with logits, `V` vocabulary.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from onegraph.config.compilation import CUDAGraphMode
from onegraph.counters import counters
from onegraph.cudagraph.sizes import Decision, Dispatcher
from onegraph.engine.block_tables import BlockTables
from onegraph.engine.kv_cache import KVCaches
from onegraph.engine.recorded_batches import Arrays, RecordedBatches, why_unrecordable
from onegraph.engine.request import Sequence
from onegraph.engine.scheduler import Batch
from onegraph.engine.weights_seen import WeightsSeen
from onegraph.errors import ConfigError, RecordingError, ShapeOutOfRangeError
from onegraph.explanation import Explanation
from onegraph.ir.recording import RecordedSize
from onegraph.ir.step_clock import StepClock
from onegraph.log import get_logger
from onegraph.numerics.oracle import SizeCheck
from onegraph.size_check import sizes_to_check

log = get_logger(__name__)


class Model(Protocol):
    """What the runner calls: `onegraph.compile`'s result."""

    def __call__(self, **inputs: Any) -> Any:
        """The flat model's forward."""

    def warm_up(self, example_kwargs: dict[str, Any], /) -> Any:
        """Compiles or loads."""

    def check_calls(
        self, calls: Iterable[tuple[int, dict[str, Any]]], shared: Mapping[str, Any]
    ) -> tuple[SizeCheck, ...]:
        """Compares with eager and fp64."""

    def explain(self) -> Explanation:
        """How it was compiled."""

    def check_state(self) -> bool:
        """Compares captured Python state with the module's now; gives whether it still holds."""

    def demote(self, error: BaseException) -> bool:
        """Has the compiled piece that raised run uncompiled; False where none did."""

    def record(self, inputs: dict[str, Any], /, *, recorded_as: CUDAGraphMode) -> Any:
        """Runs this very call, and records it."""

    def drop_recording(self, size: int | None, recorded_as: CUDAGraphMode) -> None:
        """Drops what was recorded."""

    def timed(self, clock: StepClock) -> AbstractContextManager[bool]:
        """Times the parts of calls; gives whether there are any to be seen."""

    @property
    def original(self) -> Any:
        """The model itself, uncompiled."""


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of the logits that predict prompt tokens: the first row, and the tokens, one a row."""

    sequence: Sequence
    first_row: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepLogits:
    """logits [S, V] in the model's dtype; sequences[i]'s next token is sampled from rows[i]."""

    logits: Tensor
    sequences: tuple[Sequence, ...]
    rows: tuple[int, ...]
    prompts: tuple[PromptRows, ...]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """The forward's arguments, and the first `num_rows` of its logits that somebody needs, as in StepLogits."""

    inputs: dict[str, Any]
    num_rows: int
    sequences: tuple[Sequence, ...]
    rows: tuple[int, ...]
    prompts: tuple[PromptRows, ...]


class Runner:
    """One model, its KV caches, and input buffers for the largest batch."""

    def __init__(
        self, model: Model, kv_caches: KVCaches, tables: BlockTables, *, block_size: int, max_num_tokens: int
    ) -> None:
        self._model = model
        self._weights = WeightsSeen(model.original)
        self._kv_caches = kv_caches
        self._tables = tables
        self._block_size = block_size
        max_num_seqs, max_blocks = tables.array.shape
        device = kv_caches[0][0].device
        self._input_ids = _Buffer(max_num_tokens, torch.int64, device)
        self._positions = _Buffer(max_num_tokens, torch.int64, device)
        self._slot_mapping = _Buffer(max_num_tokens, torch.int64, device)
        self._query_start_loc = _Buffer(max_num_seqs + 1, torch.int32, device)
        self._seq_lens = _Buffer(max_num_seqs, torch.int32, device)
        self._block_tables = _Buffer(max_num_seqs * max_blocks, torch.int32, device)
        self._logits_indices = _Buffer(max_num_tokens, torch.int64, device)
        self._recorded: RecordedBatches | None = None
        self._records_if_it_can = False
        self._to_record: set[tuple[CUDAGraphMode, int]] = set()
        self._largest: Decision | None = None
        self._lazily_at = 1
        self._came: Counter[tuple[CUDAGraphMode, int]] = Counter()
        self._dispatcher = Dispatcher(CUDAGraphMode.NONE, (), ())
        self.traffic: Counter[int] = Counter()
        """Batches by their numbers of tokens, of those that a recording may stand for."""
        self.unrecordable: str | None = None
        """Why nothing is recorded where that was to be tried."""
        self.told_recorded: Callable[[], None] = lambda: None
        """Called after each batch that is recorded when it comes."""

    def warm_up(self, num_tokens: int) -> None:
        """Compiles (or loads) the model on `num_tokens` padding rows, which read and write no block."""
        with torch.inference_mode():
            inputs = self._inputs(
                input_ids=np.zeros(num_tokens),
                positions=np.arange(num_tokens),
                slot_mapping=np.full(num_tokens, -1),
                query_start_loc=np.array([0, num_tokens]),
                seq_lens=np.array([num_tokens]),
                block_tables=np.zeros((1, -(-num_tokens // self._block_size))),
                logits_indices=np.array([num_tokens - 1]),
            )
            self._model.warm_up(inputs)

    def record_largest(self, batches: RecordedBatches) -> RecordedSize:
        """Records the largest of the batches, and tells what it took. Raises RecordingError."""
        largest, before = batches.largest, self._model.explain().recorded
        with torch.inference_mode():
            self._model.record(self._inputs(**batches.padding(largest)), recorded_as=largest.mode)
        self._largest = largest
        return next(one for one in self._model.explain().recorded if not any(one is known for known in before))

    def record(
        self,
        batches: RecordedBatches,
        progress: Callable[[int, int], None],
        *,
        lazily_at: int | None = None,
        if_it_can: bool = False,
    ) -> None:
        """Records the batches, the largest first; `progress` is told how many of how many are done.

        With `lazily_at` each is recorded when it comes for so many times, and runs as it is until then. Raises
        RecordingError for what can't be recorded; with `if_it_can` nothing is recorded then, and `unrecordable` says
        why.
        """
        self._recorded, self._dispatcher = batches, batches.dispatcher()
        self._records_if_it_can = if_it_can
        self._to_record, self._lazily_at = self._all_to_record(), lazily_at or 1
        if self._largest is not None:
            mode, size = self._largest.mode, self._largest.size
            if (mode, size) not in self._to_record:
                self._model.drop_recording(size, mode)
            self._to_record.discard((mode, size))
        if lazily_at is not None:
            return
        total = len(self._to_record)
        for done, (mode, size) in enumerate(sorted(self._to_record, key=lambda one: -one[1])):
            progress(done, total)
            with torch.inference_mode():
                self._record(batches, Decision(mode, size, "exact"))
            if self.unrecordable is not None:
                break
        self._to_record.clear()

    def _all_to_record(self) -> set[tuple[CUDAGraphMode, int]]:
        batches = self._recorded
        if batches is None:
            return set()
        whole = {(CUDAGraphMode.FULL, size) for size in batches.full}
        return whole | {(CUDAGraphMode.PIECEWISE, size) for size in batches.piecewise}

    def _record(self, batches: RecordedBatches, decision: Decision) -> None:
        try:
            self._model.record(self._inputs(**batches.padding(decision)), recorded_as=decision.mode)
        except Exception as error:
            if not self._records_if_it_can:
                raise
            self.record_nothing(why_unrecordable(error))

    def record_nothing(self, why: str) -> None:
        """From now on no batch is padded, and none replayed."""
        log.warning("nothing is recorded: %s", why)
        for one in self._model.explain().recorded:
            self._model.drop_recording(one.num_tokens, one.mode)
        counters.add("engines_without_recordings")
        self.unrecordable, self._recorded = why, None
        self._dispatcher = Dispatcher(CUDAGraphMode.NONE, (), (), why_off="not_recordable")

    def run(self, batch: Batch) -> StepLogits:
        """One forward over the batch."""
        with torch.inference_mode():
            prepared = self._prepare(batch)
            logits = self._forward(prepared.inputs)
        return StepLogits(logits[: prepared.num_rows], prepared.sequences, prepared.rows, prepared.prompts)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs lie."""
        return self._kv_caches[0][0].device

    def timed(self, clock: StepClock) -> AbstractContextManager[bool]:
        """Has the clock see into the model's calls; see `CompiledModel.timed`."""
        return self._model.timed(clock)

    def _prepare(self, batch: Batch) -> _Prepared:
        """The batch as it runs, in the buffers."""
        scheduled = batch.scheduled
        computed = np.array([s.sequence.num_computed_tokens for s in scheduled])
        num_new = np.array([s.num_new_tokens for s in scheduled])
        tables = self._tables.array[[s.sequence.row for s in scheduled]]
        ends = np.cumsum(num_new)
        starts = ends - num_new
        owner = np.repeat(np.arange(len(scheduled)), num_new)  # [T] the sequence of each row
        positions = np.arange(ends[-1]) + (computed - starts)[owner]
        blocks = tables[owner, positions // self._block_size]
        seq_lens = computed + num_new
        token_ids: list[int] = []
        for s in scheduled:
            first = s.sequence.num_computed_tokens
            token_ids += s.sequence.token_ids[first : first + s.num_new_tokens]
        result_rows, sequences, rows, prompts = _rows_with_logits(batch, starts.tolist(), ends.tolist())
        arrays = {
            "input_ids": np.array(token_ids),
            "positions": positions,
            "slot_mapping": blocks.astype(np.int64) * self._block_size + positions % self._block_size,
            "query_start_loc": np.concatenate(([0], ends)),
            "seq_lens": seq_lens,
            "block_tables": tables[:, : -(-int(seq_lens.max()) // self._block_size)],
            "logits_indices": np.array(result_rows),
        }
        if not prompts:
            is_decode = len(token_ids) == len(scheduled) == len(result_rows)
            arrays = self._padded(arrays, len(token_ids), is_decode)
        return _Prepared(self._inputs(**arrays), len(result_rows), sequences, rows, prompts)

    def _padded(self, arrays: Arrays, num_tokens: int, is_decode: bool) -> Arrays:
        """The batch as it runs: padded to a recorded size, which is recorded now if this is the first such batch."""
        decision = self._dispatcher.decide(num_tokens, is_uniform_decode=is_decode)
        one = decision.mode, decision.size
        if one in self._to_record:
            self._came[one] += 1
            if self._came[one] < self._lazily_at:
                decision = Decision(CUDAGraphMode.NONE, num_tokens, "not_yet_recorded")
        if decision.reason != "off":
            counters.add(f"batches:{decision.mode.name}:{decision.reason}")
        batches = self._recorded
        if batches is None:
            return arrays
        if decision.reason != "not_uniform_decode":
            self.traffic[num_tokens] += 1
        if decision.mode is CUDAGraphMode.NONE:
            return arrays
        if one in self._to_record:
            self._to_record.discard(one)
            began = time.perf_counter()
            with torch.inference_mode():
                self._record(batches, decision)
            seconds = time.perf_counter() - began
            log.info("recorded batches of %d tokens (%s) in %.2f s", decision.size, decision.mode.name, seconds)
            self.told_recorded()
        if self._recorded is None:
            return arrays
        counters.add(f"padding_rows:{decision.mode.name}", decision.size - num_tokens)
        return batches.padded(arrays, decision)

    def check(self, num_sizes: int) -> tuple[SizeCheck, ...]:
        """The model against eager and fp64 at `num_sizes` sizes of a batch (see `sizes_to_check`).

        Writes into the KV cache, so no sequence may be running. Raises ConfigError for a model that isn't compiled.
        """
        explained = self._model.explain()
        dim = next((dim for dim in explained.dims if "input_ids[0]" in dim.inputs), None)
        if dim is None:
            raise ConfigError("nothing is compiled, so there is nothing to check", hint="leave --enforce-eager out")
        most = min(len(self._kv_caches[0][0]), self._tables.array.size) * self._block_size
        sizes = [size for size in sizes_to_check(dim, explained.ledger.shapes, num_sizes) if size <= most]
        with torch.inference_mode():
            return self._model.check_calls(((size, self._prompts(size)) for size in sizes), self._shared)

    def _prompts(self, num_tokens: int) -> dict[str, Any]:
        """A batch of so many new tokens: as few prompts as can hold them, each with blocks of its own."""
        longest = self._tables.array.shape[1] * self._block_size
        lengths = np.array([min(longest, num_tokens - start) for start in range(0, num_tokens, longest)])
        ends = np.cumsum(lengths)
        positions = np.concatenate([np.arange(length) for length in lengths])
        blocks_each = -(-int(lengths.max()) // self._block_size)
        tables = np.arange(len(lengths) * blocks_each).reshape(len(lengths), blocks_each)
        blocks = tables[np.repeat(np.arange(len(lengths)), lengths), positions // self._block_size]
        return self._arrays(
            input_ids=positions % 97 + 1,
            positions=positions,
            slot_mapping=blocks * self._block_size + positions % self._block_size,
            query_start_loc=np.concatenate(([0], ends)),
            seq_lens=lengths,
            block_tables=tables,
            logits_indices=ends - 1,
        )

    def check_state(self) -> None:
        """Has the model compare its captured state; the next batch captures anew if that has changed."""
        with torch.inference_mode():  # as in a batch: the grad mode is a part of the state
            holds = self._model.check_state()
        if not holds:
            self._to_record = self._all_to_record()  # what is captured anew has no recordings

    def weights_changed(self) -> bool:
        """Whether one was written or replaced since this was last asked, as far as torch counts that."""
        return self._weights.changed()

    def _forward(self, inputs: dict[str, Any]) -> Any:
        """The compiled model, or the model itself for a batch outside the sizes that it was compiled for.

        A compiled piece that raises runs uncompiled from then on, and the batch is computed again: what it has written
        into the KV cache is written once more.
        """
        try:
            return self._model(**inputs)
        except ShapeOutOfRangeError as error:
            counters.add(f"eager_batches:{error.code}")
            log.warning("a batch ran uncompiled: %s", error.message)
            return self._model.original(**inputs)
        except RecordingError as error:
            if not self._records_if_it_can or self._recorded is None:
                raise
            self.record_nothing(error.message)
            return self._forward(inputs)
        except Exception as error:
            if not self._model.demote(error):
                raise
            self._to_record = self._all_to_record()  # the recordings had the piece that runs uncompiled now
            return self._forward(inputs)

    def _inputs(self, **arrays: "np.ndarray[Any, Any]") -> dict[str, Any]:
        """The forward's keyword arguments: views of the buffers, filled with these arrays."""
        return {**self._arrays(**arrays), **self._shared}

    def _arrays(self, **arrays: "np.ndarray[Any, Any]") -> dict[str, Any]:
        return {name: getattr(self, f"_{name}").fill(array) for name, array in arrays.items()}

    @property
    def _shared(self) -> dict[str, Any]:
        """The arguments that are the same for every batch."""
        return {"kv_caches": self._kv_caches}


class _Buffer:
    """A tensor on the model's device that is filled from its start, so that its address and alignment never change."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        with torch.inference_mode():
            self._host = torch.zeros(size, dtype=dtype)
            self._tensor = self._host.to(device)  # itself where it is there already
        self._array = self._host.numpy()

    def fill(self, values: "np.ndarray[Any, Any]") -> Tensor:
        """A contiguous view of the buffer's start with the values and their shape."""
        self._array[: values.size] = values.reshape(-1)
        filled = self._tensor[: values.size]
        if self._tensor is not self._host:
            # Without waiting for the device. The host's side isn't pinned, so it is read before this returns.
            filled.copy_(self._host[: values.size], non_blocking=True)
        return filled.view(values.shape)


def _rows_with_logits(
    batch: Batch, starts: list[int], ends: list[int]
) -> tuple[list[int], tuple[Sequence, ...], tuple[int, ...], tuple[PromptRows, ...]]:
    """Which rows of the batch need logits, and who uses each; at least one row, since no model takes none."""
    indices: list[int] = []
    sequences: list[Sequence] = []
    rows: list[int] = []
    prompts: list[PromptRows] = []
    for item, start, end in zip(batch.scheduled, starts, ends, strict=True):
        sequence = item.sequence
        missing = _missing_prompt_tokens(sequence, item.num_new_tokens)
        if missing:
            offset = start + len(sequence.request.prompt_logprobs) - 1 - sequence.num_computed_tokens
            prompts.append(PromptRows(sequence, len(indices), missing))
            indices.extend(range(offset, offset + len(missing)))
        if item.samples:
            sequences.append(sequence)
            rows.append(len(indices))
            indices.append(end - 1)
    return indices or [0], tuple(sequences), tuple(rows), tuple(prompts)


def _missing_prompt_tokens(sequence: Sequence, num_new_tokens: int) -> tuple[int, ...]:
    """The prompt tokens whose log-probabilities were asked for, are not there, and this step can give.

    The row at position p predicts the token at p + 1.
    """
    request = sequence.request
    if not request.num_missing_prompt_logprobs or sequence.index != 0:
        return ()
    have = len(request.prompt_logprobs)
    return request.prompt_token_ids[have : sequence.num_computed_tokens + num_new_tokens + 1]
