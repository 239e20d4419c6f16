"""The cache write: where each token lands, in which dtype, and from tensors that aren't contiguous."""

from __future__ import annotations

import pytest
import torch

import onegraph.ops  # noqa: F401 - registers the ops

BLOCKS, BLOCK, HEADS, SIZE = 5, 4, 2, 8


def caches(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.full((BLOCKS, BLOCK, HEADS, SIZE), -1.0, dtype=dtype),
        torch.full((BLOCKS, BLOCK, HEADS, SIZE), -2.0, dtype=dtype),
    )


@pytest.mark.parametrize("seed", range(6))
def test_each_token_lands_in_its_block_and_place(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(BLOCKS * BLOCK, generator=generator)[: 1 + seed * 3]
    slots[torch.rand(len(slots), generator=generator) < 0.3] = -1
    k, v = (torch.randn(len(slots), HEADS, SIZE, generator=generator) for _ in range(2))
    k_cache, v_cache = caches()
    wanted_k, wanted_v = caches()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted_k[slot // BLOCK, slot % BLOCK] = k[row]
            wanted_v[slot // BLOCK, slot % BLOCK] = v[row]
    torch.ops.onegraph.write_kv_cache(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, wanted_k) and torch.equal(v_cache, wanted_v)


def test_no_tokens_write_nothing() -> None:
    k_cache, v_cache = caches()
    empty = torch.empty(0, HEADS, SIZE)
    torch.ops.onegraph.write_kv_cache(empty, empty, k_cache, v_cache, torch.empty(0, dtype=torch.int64))
    assert torch.equal(k_cache, caches()[0]) and torch.equal(v_cache, caches()[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_are_kept_in_the_caches_dtype(dtype: torch.dtype) -> None:
    k_cache, v_cache = caches(dtype)
    k, v = torch.full((1, HEADS, SIZE), 1 / 3), torch.full((1, HEADS, SIZE), 2 / 3)
    torch.ops.onegraph.write_kv_cache(k, v, k_cache, v_cache, torch.tensor([7]))
    assert torch.equal(k_cache[1, 3], k[0].to(dtype)) and torch.equal(v_cache[1, 3], v[0].to(dtype))


def test_views_of_one_projection_are_written_as_they_read() -> None:
    """Keys and values as a fused projection and a transpose leave them: strided, sharing memory."""
    joint = torch.randn(HEADS, 3, 2 * SIZE, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    k, v = joint.split(SIZE, dim=-1)
    assert not k.is_contiguous()
    k_cache, v_cache = caches()
    torch.ops.onegraph.write_kv_cache(k, v, k_cache, v_cache, torch.tensor([19, -1, 0]))
    assert torch.equal(k_cache[4, 3], k[0]) and torch.equal(v_cache[0, 0], v[2])
    assert int((k_cache != -1).any(-1).any(-1).sum()) == 2
