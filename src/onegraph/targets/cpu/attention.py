"""`onegraph::paged_attention` and `onegraph::write_kv_cache` on the CPU: C++ kernels behind the ops.

Takes the built library's functions; gives an implementation for each op. What the kernels don't do (dtypes beside
fp32 and bf16, layouts that nothing of ours makes) is left to the reference in `ops`.

Letters: T tokens, R requests, H query heads, K key-value heads, D head size, N blocks, B block size, M most blocks
of a request.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from onegraph.ops import attention, kv_cache

_NO_WINDOW = 1 << 60


def implementations(library: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """By op name."""
    return {
        "paged_attention": functools.partial(_paged_attention, library["paged_attention"]),
        "write_kv_cache": functools.partial(_write_kv_cache, library["write_kv_cache"]),
    }


def _paged_attention(
    attend: Callable[..., None],
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    logit_softcap: float | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    dtype, strides, cache_shape = q.dtype, q.stride(), k_cache.shape
    if not (
        (dtype is torch.float32 or dtype is torch.bfloat16)
        and k_cache.dtype is dtype
        and v_cache.dtype is dtype
        and strides[2] == 1
        and v_cache.shape == cache_shape
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and block_tables.dtype is query_start_loc.dtype is seq_lens.dtype is torch.int32
        and block_tables.stride(1) == 1
        and query_start_loc.is_contiguous()
        and seq_lens.is_contiguous()
        and (sinks is None or (sinks.dtype is dtype and sinks.is_contiguous()))
        and logit_softcap != 0
    ):
        return attention.paged_attention(
            q,
            k_cache,
            v_cache,
            block_tables,
            query_start_loc,
            seq_lens,
            scale,
            sliding_window,
            logit_softcap,
            sinks,
        )
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    attend(
        out,
        q,
        k_cache,
        v_cache,
        block_tables,
        query_start_loc,
        seq_lens,
        sinks,
        *q.shape,
        *cache_shape[:3],
        *block_tables.shape,
        strides[0],
        strides[1],
        block_tables.stride(0),
        scale,
        _NO_WINDOW if sliding_window is None else sliding_window,
        0.0 if logit_softcap is None else logit_softcap,
        torch.get_num_threads(),
        dtype is torch.bfloat16,
    )
    return out


def _write_kv_cache(
    write: Callable[..., None],
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    k_strides, v_strides, shape, size = k.stride(), v.stride(), k_cache.shape, k.itemsize
    if not (
        k_cache.dtype is v_cache.dtype is k.dtype is v.dtype
        and k_strides[2] == v_strides[2] == 1
        and k.shape == v.shape == (slot_mapping.shape[0], *shape[2:])
        and v_cache.shape == shape
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and slot_mapping.dtype is torch.int64
        and slot_mapping.is_contiguous()
    ):
        return kv_cache.write_kv_cache(k, v, k_cache, v_cache, slot_mapping)
    write(
        k,
        k_cache,
        k_strides[0] * size,
        k_strides[1] * size,
        v,
        v_cache,
        v_strides[0] * size,
        v_strides[1] * size,
        slot_mapping,
        *k.shape[:2],
        shape[3] * size,
        shape[0] * shape[1],
        torch.get_num_threads(),
    )
    return None
