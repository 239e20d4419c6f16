"""Places in a block of memory: buffers that are in use at the same time don't overlap, and few bytes lie idle."""

from random import Random

import torch

from onegraph.plan.memory import ALIGNMENT, num_bytes, places


def test_drawn_buffers_lie_apart_while_they_are_used() -> None:
    for seed in range(300):
        random = Random(seed)
        firsts = sorted(random.randint(0, 20) for _ in range(random.randint(0, 30)))
        sizes = (random.choice([0, 1, 64, 100, 4096]) for _ in firsts)
        buffers = [(size, first, first + random.randint(0, 6)) for size, first in zip(sizes, firsts, strict=True)]
        offsets, most = places(buffers)
        assert all(offset % ALIGNMENT == 0 for offset in offsets)
        for i, (size, first, last) in enumerate(buffers):
            assert offsets[i] + size <= most
            for j in range(i):
                other_size, other_first, other_last = buffers[j]
                together = first <= other_last and other_first <= last
                apart = offsets[i] + size <= offsets[j] or offsets[j] + other_size <= offsets[i]
                assert apart or not together, (seed, i, j)
        live = [sum(size + ALIGNMENT for size, first, last in buffers if first <= t <= last) for t in range(27)]
        assert most <= 2 * max(live, default=0), seed


def test_equal_buffers_take_turns() -> None:
    assert places([(64, call, call + 1) for call in range(10)]) == ([0, 64] * 5, 128)


def test_bytes_reach_to_the_last_element() -> None:
    assert num_bytes(((2, 3), (3, 1), torch.float32)) == 24
    assert num_bytes(((2, 3), (10, 2), torch.bfloat16)) == 2 * 15
    assert num_bytes(((), (), torch.int64)) == 8
    assert num_bytes(((4, 0), (1, 1), torch.float64)) == 0
