"""The C++ kernel of rotary: bit by bit what the reference computes, for all layouts that it takes, alone and fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onegraph.ops import rotary as reference
from onegraph.ops.library import implementation

BLOCKS, BLOCK = 6, 4


def given(
    num_tokens: int, heads: tuple[int, int], head_size: int, size: int, dtype: torch.dtype, *, batch: bool = False
) -> list[torch.Tensor]:
    """`q`, `k`, `v` as columns of one projection, `cos`, `sin`."""
    generator = torch.Generator().manual_seed(num_tokens)
    wide = torch.randn(num_tokens, (heads[0] + 2 * heads[1]) * head_size, generator=generator).to(dtype)
    q, k, v = wide.split([heads[0] * head_size, heads[1] * head_size, heads[1] * head_size], -1)
    shape = (1, num_tokens, size) if batch else (num_tokens, size)
    by = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    return [one.unflatten(-1, (-1, head_size)) for one in (q, k, v)] + by


CASES = {
    "a token": (1, (9, 3), 64, 64),
    "threads": (300, (9, 3), 64, 64),
    "a part turns": (7, (4, 2), 24, 16),
    "no whole vectors": (5, (3, 3), 10, 6),
    "more than a vector and a rest": (5, (2, 1), 80, 80),
    "no tokens": (0, (4, 2), 16, 16),
}


@pytest.mark.usefixtures("op_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernel_is_the_reference(case: Any, dtype: torch.dtype) -> None:
    q, k, _, cos, sin = given(*case, dtype)
    for found, wanted in zip(torch.ops.onegraph.rotary(q, k, cos, sin), reference.rotary(q, k, cos, sin), strict=True):
        assert found.is_contiguous()
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("op_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_keys_and_values_land_in_the_cache(case: Any, dtype: torch.dtype) -> None:
    num_tokens, (_, heads), head_size, _ = case
    inputs = given(*case, dtype, batch=True)
    slots = torch.randperm(max(BLOCKS * BLOCK, num_tokens), generator=torch.Generator().manual_seed(0))[:num_tokens]
    slots[1::3] = -1
    made = []
    for op in (torch.ops.onegraph.rotary_write_kv_cache, reference.rotary_write_kv_cache):
        caches = [torch.zeros(max(BLOCKS, -(-num_tokens // BLOCK)), BLOCK, heads, head_size, dtype=dtype) for _ in "kv"]
        made.append([op(*inputs, *caches, slots), *caches])
    for found, wanted in zip(*made, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("op_kernels")
def test_the_result_lies_in_the_memory_that_is_given() -> None:
    inputs = given(3, (4, 2), 16, 16, torch.float32)
    caches = [torch.zeros(BLOCKS, BLOCK, 2, 16) for _ in "kv"]
    out = torch.empty(3, 4, 16)
    fused: Any = implementation("rotary_write_kv_cache", "CPU")
    assert fused(*inputs, *caches, torch.arange(3), out=out) is out
    assert torch.equal(out, reference.rotary(*inputs[:2], *inputs[3:])[0])


@pytest.mark.usefixtures("op_kernels")
def test_a_slot_outside_of_the_cache_is_refused() -> None:
    inputs = given(2, (4, 2), 16, 16, torch.float32)
    caches = [torch.zeros(1, BLOCK, 2, 16) for _ in "kv"]
    with pytest.raises(RuntimeError, match="slot_mapping names a slot that isn't in the cache"):
        torch.ops.onegraph.rotary_write_kv_cache(*inputs, *caches, torch.tensor([0, BLOCK]))


@pytest.mark.usefixtures("op_kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_what_the_kernel_does_not_do_is_left_to_the_reference(dtype: torch.dtype) -> None:
    q, k, _, cos, sin = given(5, (4, 2), 16, 16, dtype)
    for found, wanted in zip(torch.ops.onegraph.rotary(q, k, cos, sin), reference.rotary(q, k, cos, sin), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("op_kernels")
def test_heads_that_do_not_lie_side_by_side() -> None:
    q, k = (torch.randn(heads, 5, 16).transpose(0, 1) for heads in (4, 2))
    cos, sin = torch.randn(5, 16), torch.randn(5, 16)
    for found, wanted in zip(torch.ops.onegraph.rotary(q, k, cos, sin), reference.rotary(q, k, cos, sin), strict=True):
        assert torch.equal(found, wanted)
