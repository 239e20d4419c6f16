"""Functionalisation never clones the KV cache: what is compiled writes into the caller's memory, once."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

import onegraph
import onegraph.ops

NUM_TOKENS = Dim("num_tokens", min=1, max=16)
NUM_BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE = 512, 4, 2, 8
CACHE_ELEMENTS = NUM_BLOCKS * BLOCK_SIZE * HEADS * HEAD_SIZE


def attention_layers(
    x: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    kv_caches: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Three layers of attention, each with its own cache, with a view and arithmetic in between."""
    for k_cache, v_cache in kv_caches:
        q = x.view(-1, HEADS, HEAD_SIZE) * 1.5
        torch.ops.onegraph.write_kv_cache(q + 1, q - 1, k_cache, v_cache, slot_mapping)
        out = torch.ops.onegraph.paged_attention(
            q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, 0.3, None, None, None
        )
        x = x + out.view(-1, HEADS * HEAD_SIZE)
    return x


def inputs(size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(size)
    return {
        "x": torch.randn(size, HEADS * HEAD_SIZE, generator=generator),
        "slot_mapping": torch.arange(4, 4 + size),
        "query_start_loc": torch.tensor([0, size], dtype=torch.int32),
        "seq_lens": torch.tensor([size], dtype=torch.int32),
        "block_tables": torch.arange(1, 9, dtype=torch.int32)[None],
        "kv_caches": [tuple(torch.zeros(NUM_BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE) for _ in range(2)) for _ in range(3)],
    }


class LargestAllocation(TorchDispatchMode):
    """Remembers the most elements that an op of the dispatcher returned in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        given = {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, torch.Tensor)}
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_the_cache_is_written_in_place_and_never_copied(backend: str) -> None:
    shapes = {"x": {0: NUM_TOKENS}, "slot_mapping": {0: NUM_TOKENS}}
    compiled = onegraph.compile(attention_layers, dynamic_shapes=shapes, config={"backend": backend})
    compiled.warm_up(inputs(3))
    for size in (1, 5, 16):
        ours, reference = inputs(size), inputs(size)
        addresses = [t.data_ptr() for pair in ours["kv_caches"] for t in pair]
        with LargestAllocation() as largest, torch.no_grad():
            out = compiled(**ours)
        assert largest.elements < CACHE_ELEMENTS, f"something as large as a cache was allocated: {largest.elements}"
        torch.testing.assert_close(out, attention_layers(**reference), rtol=1e-4, atol=1e-4)
        assert addresses == [t.data_ptr() for pair in ours["kv_caches"] for t in pair]
        for (k, v), (expected_k, expected_v) in zip(ours["kv_caches"], reference["kv_caches"], strict=True):
            torch.testing.assert_close(k, expected_k, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(v, expected_v, rtol=1e-4, atol=1e-4)


def test_inductors_code_allocates_no_buffer_of_the_caches_size(fresh_cache: Any) -> None:
    """Inductor's own allocations don't pass the dispatcher, so they are read off its code."""
    shapes = {"x": {0: NUM_TOKENS}, "slot_mapping": {0: NUM_TOKENS}}
    whole = onegraph.compile(attention_layers, dynamic_shapes=shapes, config={"splitting_ops": []})
    whole.warm_up(inputs(3))
    sources = [p.read_bytes() for p in (fresh_cache / "blobs").rglob("*") if p.is_file()]
    wrapper = next(s.decode() for s in sources if b"empty_strided_cpu" in s)
    assert wrapper.count("torch.ops.onegraph.write_kv_cache") == 3
    allocated = re.findall(r"empty_strided_cpu\(\(([^)]*)\)", wrapper)
    assert allocated and not [shape for shape in allocated if str(NUM_BLOCKS) in shape]


def test_the_check_itself_sees_a_clone() -> None:
    with LargestAllocation() as largest:
        torch.zeros(NUM_BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE).clone()
    assert largest.elements >= CACHE_ELEMENTS
