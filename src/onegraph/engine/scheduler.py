"""Chooses what the next step computes: continuous batching with chunked prefill under a token budget.

Takes: sequences, first come first served. Gives: a `Batch`, sequences with the number of their next tokens to
compute.
Keeps: the waiting and the running queue, and every running sequence's blocks. A sequence is admitted when
blocks for all its known tokens are free; where a running one can't grow, the youngest is preempted: its
blocks are released and it is computed again later (its full blocks often hit the prefix cache then).
"""

from collections import deque
from dataclasses import dataclass

from onegraph.engine.block_tables import BlockTables
from onegraph.engine.kv_blocks import ROOT_PREFIX, BlockPool, PrefixHit
from onegraph.engine.request import NO_ROW, Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """A sequence and how many of its tokens, from `sequence.num_computed_tokens` on, this step computes."""

    sequence: Sequence
    num_new_tokens: int

    @property
    def samples(self) -> bool:
        """True when its last known token is computed, so that the next one can be sampled."""
        return self.sequence.num_computed_tokens + self.num_new_tokens == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes; never empty."""

    scheduled: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Rows of the flat batch."""
        return sum(s.num_new_tokens for s in self.scheduled)


class Scheduler:
    """The two queues. `max_num_batched_tokens` bounds a batch's tokens, the tables' rows bound its
    sequences.
    """

    def __init__(
        self,
        pool: BlockPool,
        tables: BlockTables,
        *,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool,
    ) -> None:
        self.pool = pool
        self.tables = tables
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence whose tokens, and those it may still generate, fit the pool alone."""
        self.waiting.append(sequence)

    def schedule(self) -> Batch | None:
        """The next batch; None when there is nothing to do."""
        budget = self.max_num_batched_tokens
        scheduled: list[ScheduledSequence] = []
        preemptions_before = self.num_preemptions
        at = 0
        while at < len(self.running) and budget > 0:
            sequence = self.running[at]
            num_new = min(len(sequence.token_ids) - sequence.num_computed_tokens, budget)
            if not self._grow(sequence, sequence.num_computed_tokens + num_new):
                break  # it was itself the youngest, so nothing is left to schedule after it
            scheduled.append(ScheduledSequence(sequence, num_new))
            budget -= num_new
            at += 1
        siblings: list[Sequence] = []
        while self.waiting and budget > 0 and self.num_preemptions == preemptions_before:
            sequence = self.waiting[0]
            if self._will_hit_its_sibling(sequence):
                siblings.append(self.waiting.popleft())
                continue
            if not self._admit(sequence):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            num_new = min(len(sequence.token_ids) - sequence.num_computed_tokens, budget)
            scheduled.append(ScheduledSequence(sequence, num_new))
            budget -= num_new
        self.waiting.extendleft(reversed(siblings))
        assert scheduled or not (self.running or self.waiting), "a sequence that can never fit was added"
        return Batch(tuple(scheduled)) if scheduled else None

    def computed(self, batch: Batch) -> None:
        """Notes that the batch ran: its tokens are in the cache and its full blocks can be shared."""
        for item in batch.scheduled:
            item.sequence.num_computed_tokens += item.num_new_tokens
            if self.enable_prefix_caching:
                self._register_full_blocks(item.sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and releases its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def reset(self) -> None:
        """Drops every sequence and the prefix cache: a clean state whatever happened before."""
        self.waiting.clear()
        self.running.clear()
        self.pool.reset()
        self.tables.reset()

    def _will_hit_its_sibling(self, sequence: Sequence) -> bool:
        """True while the first sample of the same prompt computes blocks that this one can share when done."""
        first, num_prompt = sequence.request.sequences[0], sequence.num_prompt_tokens
        return (
            self.enable_prefix_caching
            and sequence is not first
            and num_prompt > self.pool.block_size
            and not first.finished
            and first.num_computed_tokens < num_prompt
        )

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence a row and blocks for all its known tokens, or nothing."""
        if not self.tables.num_free_rows:
            return False
        num_tokens = len(sequence.token_ids)
        hit = PrefixHit()
        # Cached tokens have no logits, which a sampled token and prompt log-probabilities need.
        if self.enable_prefix_caching and not sequence.request.num_missing_prompt_logprobs:
            hit = self.pool.match(sequence.token_ids, num_tokens - 1)
        num_new_blocks = self.pool.num_blocks_for(num_tokens) - len(hit.blocks)
        if num_new_blocks > self.pool.num_free - self.pool.num_free_among(hit.blocks):
            return False
        self.pool.retain(hit.blocks)
        sequence.blocks = [*hit.blocks, *self.pool.allocate(num_new_blocks)]
        sequence.row = self.tables.take_row()
        self.tables.write(sequence.row, 0, sequence.blocks)
        sequence.num_computed_tokens = len(hit.blocks) * self.pool.block_size
        sequence.num_registered_blocks = len(hit.blocks)
        sequence.prefix = hit.prefix
        if not sequence.num_output_tokens:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        return True

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes room for a running sequence's tokens, preempting the youngest; False when that was itself."""
        num_more = self.pool.num_blocks_for(num_tokens) - len(sequence.blocks)
        if num_more <= 0:
            return True
        while self.pool.num_free < num_more:
            victim = self.running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        more = self.pool.allocate(num_more)
        self.tables.write(sequence.row, len(sequence.blocks), more)
        sequence.blocks.extend(more)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        self.tables.give_back_row(sequence.row)
        sequence.blocks = []
        sequence.row = NO_ROW
        sequence.num_computed_tokens = 0
        sequence.num_registered_blocks = 0
        sequence.prefix = ROOT_PREFIX

    def _register_full_blocks(self, sequence: Sequence) -> None:
        size = self.pool.block_size
        for at in range(sequence.num_registered_blocks, sequence.num_computed_tokens // size):
            tokens = sequence.token_ids[at * size : (at + 1) * size]
            sequence.prefix = self.pool.register(sequence.blocks[at], sequence.prefix, tokens)
            sequence.num_registered_blocks += 1
