"""The block pool: references, sharing by content, and what is given out first."""

import random

import pytest

from onegraph.engine.kv_blocks import ROOT_PREFIX, BlockPool


def fill(pool: BlockPool, token_ids: list[int]) -> list[int]:
    """Allocates blocks for the tokens and registers the full ones, as a computed sequence would."""
    blocks = pool.allocate(pool.num_blocks_for(len(token_ids)))
    prefix = ROOT_PREFIX
    for at in range(len(token_ids) // pool.block_size):
        prefix = pool.register(blocks[at], prefix, token_ids[at * pool.block_size : (at + 1) * pool.block_size])
    return blocks


def test_a_released_chain_is_found_again_block_by_block():
    pool = BlockPool(8, 2)
    tokens = [1, 2, 3, 4, 5]
    blocks = fill(pool, tokens)
    pool.release(blocks)
    assert pool.num_free == 8
    assert pool.match(tokens, 5).blocks == tuple(blocks[:2])
    assert pool.match(tokens, 3).blocks == tuple(blocks[:1])  # a limit within the second block
    assert pool.match([1, 2, 9, 9], 4).blocks == tuple(blocks[:1])
    assert pool.match([3, 4], 2).blocks == ()  # the same tokens behind another prefix


def test_equal_tokens_behind_different_prefixes_are_different_contents():
    pool = BlockPool(8, 2)
    first = fill(pool, [1, 1, 7, 7])
    second = fill(pool, [2, 2, 7, 7])
    assert pool.match([1, 1, 7, 7], 4).blocks == tuple(first)
    assert pool.match([2, 2, 7, 7], 4).blocks == tuple(second)


def test_a_child_of_a_forgotten_block_is_not_found_behind_its_successor():
    pool = BlockPool(3, 2)
    parent, child = fill(pool, [1, 2, 3, 4])
    pool.release([parent])
    assert pool.allocate(2)[-1] == parent  # the free one without content, then the parent: forgotten
    pool.register(parent, ROOT_PREFIX, [9, 9])
    assert pool.match([9, 9, 3, 4], 4).blocks == (parent,)  # not the child: it stood behind [1, 2]
    assert pool.match([1, 2, 3, 4], 4).blocks == ()
    pool.release([child])


def test_the_same_content_twice_keeps_one_findable_and_one_chain():
    pool = BlockPool(8, 2)
    first, second = fill(pool, [1, 2, 3, 4]), fill(pool, [1, 2, 3, 4])
    assert pool.match([1, 2, 3, 4], 4).blocks == tuple(first)
    assert set(first).isdisjoint(second)
    longer = fill(pool, [1, 2, 3, 4, 5, 6])
    assert pool.match([1, 2, 3, 4, 5, 6], 6).blocks == (*first, longer[2])
    for blocks in (first, second, longer):
        pool.release(blocks)
    assert pool.num_free == 8


def test_blocks_without_content_go_first_then_the_least_recently_used_tail_first():
    pool = BlockPool(5, 1)
    old, new = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) == [4]  # never used
    assert pool.allocate(4) == [old[1], old[0], new[1], new[0]]


def test_a_released_block_without_content_goes_before_cached_ones():
    pool = BlockPool(2, 1)
    cached, plain = fill(pool, [1]), pool.allocate(1)
    pool.release(cached)
    pool.release(plain)
    assert pool.allocate(1) == plain


def test_a_retained_block_is_not_given_out():
    pool = BlockPool(2, 1)
    blocks = fill(pool, [1])
    pool.release(blocks)
    hit = pool.match([1, 2], 1)
    assert pool.num_free_among(hit.blocks) == 1
    pool.retain(hit.blocks)
    pool.retain(hit.blocks)
    assert pool.num_free == 1 and blocks[0] not in pool.allocate(1)
    pool.release(blocks)
    assert pool.num_free == 0
    pool.release(blocks)
    assert pool.num_free == 1


def test_double_release_is_our_own_bug():
    pool = BlockPool(2, 1)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.release(blocks)


def test_random_use_never_confuses_contents_or_loses_blocks():
    """Against a model that remembers what each block holds: a hit always holds exactly the prompt's
    tokens.
    """
    rng = random.Random(0)
    pool, size = BlockPool(12, 2), 2
    holds: dict[int, tuple[int, ...]] = {}  # block -> all tokens from the start to its end
    live: list[list[int]] = []
    num_hits = 0
    for _ in range(2000):
        if live and rng.random() < 0.5:
            pool.release(live.pop(rng.randrange(len(live))))
            continue
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 9))]
        hit = pool.match(tokens, len(tokens) - 1)
        num_hits += len(hit.blocks)
        for at, block in enumerate(hit.blocks):
            assert holds[block] == tuple(tokens[: (at + 1) * size])
        num_new = pool.num_blocks_for(len(tokens)) - len(hit.blocks)
        if num_new > pool.num_free - pool.num_free_among(hit.blocks):
            continue
        pool.retain(hit.blocks)
        blocks = [*hit.blocks, *pool.allocate(num_new)]
        prefix = hit.prefix
        for at in range(len(hit.blocks), len(tokens) // size):
            holds[blocks[at]] = tuple(tokens[: (at + 1) * size])
            prefix = pool.register(blocks[at], prefix, tokens[at * size : (at + 1) * size])
        live.append(blocks)
        assert pool.num_free == 12 - len({b for blocks in live for b in blocks})
    assert num_hits > 100
