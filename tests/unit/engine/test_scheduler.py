"""The scheduler: budget, chunks, preemption, prefix hits; and that every request ends whatever the sizes
are.
"""

import random
from itertools import count

import pytest

from onegraph.engine.block_tables import BlockTables
from onegraph.engine.kv_blocks import BlockPool
from onegraph.engine.request import Request, Sequence
from onegraph.engine.sampling_params import SamplingParams
from onegraph.engine.scheduler import Batch, Scheduler

numbers = count()


def make(num_blocks: int = 32, block_size: int = 4, budget: int = 16, max_num_seqs: int = 4, caching: bool = True):
    pool = BlockPool(num_blocks, block_size)
    tables = BlockTables(max_num_seqs, num_blocks)
    return Scheduler(pool, tables, max_num_batched_tokens=budget, enable_prefix_caching=caching)


def sequence(token_ids: list[int], **params) -> Sequence:
    request = Request(str(next(numbers)), None, tuple(token_ids), SamplingParams(**params))
    request.sequences.append(
        Sequence(request=request, index=0, token_ids=list(token_ids), max_tokens=100, stream=random.Random(0))
    )
    return request.sequences[0]


def run(scheduler: Scheduler, batch: Batch) -> None:
    """What the engine does with a batch: every sequence that samples gets the token 7."""
    sampling = [item.sequence for item in batch.scheduled if item.samples]
    scheduler.computed(batch)
    for one in sampling:
        one.token_ids.append(7)


def sizes(batch: Batch) -> list[int]:
    return [item.num_new_tokens for item in batch.scheduled]


def test_prompts_share_the_budget_and_a_long_one_goes_in_chunks_beside_decodes():
    scheduler = make(budget=16)
    short, long = sequence([1] * 6), sequence([2] * 30)
    scheduler.add(short)
    scheduler.add(long)
    batches = []
    for _ in range(3):
        batch = scheduler.schedule()
        batches.append((sizes(batch), [item.samples for item in batch.scheduled]))
        assert batch.num_tokens <= 16
        run(scheduler, batch)
    assert batches == [([6, 10], [True, False]), ([1, 15], [True, False]), ([1, 5], [True, True])]


def test_no_more_sequences_than_rows():
    scheduler = make(max_num_seqs=2, budget=100)
    for _ in range(3):
        scheduler.add(sequence([1, 2, 3]))
    batch = scheduler.schedule()
    assert len(batch.scheduled) == 2 and len(scheduler.waiting) == 1
    scheduler.remove(batch.scheduled[0].sequence)
    run(scheduler, Batch(batch.scheduled[1:]))
    assert len(scheduler.schedule().scheduled) == 2


def test_the_youngest_is_preempted_and_computed_again():
    scheduler = make(num_blocks=4, block_size=2, caching=False)
    old, young = sequence([1, 2, 3]), sequence([4, 5, 6])
    scheduler.add(old)
    scheduler.add(young)
    run(scheduler, scheduler.schedule())  # 2 + 2 blocks, one place left in each
    run(scheduler, scheduler.schedule())
    batch = scheduler.schedule()  # both need a third block, none is there
    assert [item.sequence for item in batch.scheduled] == [old]
    assert list(scheduler.waiting) == [young] and young.blocks == [] and young.num_computed_tokens == 0
    assert scheduler.num_preemptions == 1
    run(scheduler, batch)
    assert young.token_ids == [4, 5, 6, 7, 7]
    scheduler.remove(old)
    batch = scheduler.schedule()
    assert [item.sequence for item in batch.scheduled] == [young] and sizes(batch) == [5]


def test_a_prefix_that_was_computed_is_not_computed_again():
    scheduler = make(block_size=4, budget=100)
    first = sequence(list(range(10)))
    scheduler.add(first)
    run(scheduler, scheduler.schedule())
    second = sequence([*range(8), 50, 51, 52])
    scheduler.add(second)
    batch = scheduler.schedule()
    assert sizes(batch) == [1, 3]
    assert second.blocks[:2] == first.blocks[:2] and second.num_cached_tokens == 8
    assert scheduler.tables.array[second.row, :3].tolist() == second.blocks
    run(scheduler, batch)
    scheduler.remove(first)
    scheduler.remove(second)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def test_of_a_prompt_that_is_cached_whole_the_last_block_is_computed_for_its_logits():
    scheduler = make(block_size=4, budget=100)
    for _ in range(2):
        one = sequence(list(range(8)))
        scheduler.add(one)
        batch = scheduler.schedule()
        run(scheduler, batch)
        scheduler.remove(one)
    assert sizes(batch) == [4] and one.token_ids[-1] == 7


def test_prompt_logprobs_or_no_prefix_caching_compute_the_whole_prompt():
    for caching, params in ((True, {"prompt_logprobs": 1}), (False, {})):
        scheduler = make(block_size=4, budget=100, caching=caching)
        for _ in range(2):
            one = sequence(list(range(8)), **params)
            scheduler.add(one)
            batch = scheduler.schedule()
            run(scheduler, batch)
            scheduler.remove(one)
        assert sizes(batch) == [8]


def test_removing_a_waiting_sequence_needs_no_blocks():
    scheduler = make(max_num_seqs=1)
    first, second = sequence([1]), sequence([2])
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    scheduler.remove(second)
    assert not scheduler.waiting
    scheduler.remove(second)  # again: nothing happens
    scheduler.remove(first)
    assert scheduler.schedule() is None


@pytest.mark.parametrize("seed", range(6))
def test_every_request_ends_and_no_block_is_lost(seed: int):
    rng = random.Random(seed)
    num_blocks, block_size = rng.randrange(4, 12), rng.choice([1, 2, 4])
    room = num_blocks * block_size
    scheduler = make(
        num_blocks, block_size, rng.choice([1, 3, 8, 64]), rng.choice([1, 3, 8]), caching=rng.random() < 0.7
    )
    todo = [sequence([rng.randrange(2) for _ in range(rng.randrange(1, room))]) for _ in range(20)]
    length = {one: rng.randrange(len(one.token_ids) + 1, room + 1) for one in todo}
    for one in todo:
        scheduler.add(one)
    for _ in range(5000):
        batch = scheduler.schedule()
        if batch is None:
            break
        assert 0 < batch.num_tokens <= scheduler.max_num_batched_tokens
        assert all(item.num_new_tokens > 0 for item in batch.scheduled)
        for item in batch.scheduled:
            one = item.sequence
            assert len(one.blocks) * block_size >= one.num_computed_tokens + item.num_new_tokens
            assert scheduler.tables.array[one.row, : len(one.blocks)].tolist() == one.blocks
        run(scheduler, batch)
        for item in batch.scheduled:
            if len(item.sequence.token_ids) >= length[item.sequence]:
                scheduler.remove(item.sequence)
    assert batch is None
    assert all(len(one.token_ids) == length[one] for one in todo)
    assert scheduler.pool.num_free == num_blocks
    assert scheduler.tables.num_free_rows == len(scheduler.tables.array)
