"""`onegraph::rotary` and `onegraph::rotary_write_kv_cache` on the CPU: one C++ kernel behind both.

Takes the built library's functions; gives an implementation for each op. What the kernel doesn't do (dtypes beside
fp32 and bf16, heads that don't lie side by side) is left to the reference in `ops`.

Letters: T tokens, H query heads, K key-value heads, D head size, R the part of it that turns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from onegraph.ops import rotary as reference

_MAX_TURNED = 512
"""As in rotary.h."""


def implementations(library: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """By op name; each is called with CPU tensors as its op's schema says. `out` is memory for a single result."""
    kernel = library["rotary"]
    return {
        "rotary": functools.partial(_rotary, kernel),
        "rotary_write_kv_cache": functools.partial(_rotary_write_kv_cache, kernel),
    }


def _rotary(
    turn: Callable[..., None], q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, (num_tokens, num_heads, head_size), k_shape = q.dtype, q.shape, k.shape
    strides, k_strides, cos_strides, sin_strides = q.stride(), k.stride(), cos.stride(), sin.stride()
    cos_shape = cos.shape
    size = cos_shape[-1]
    if not (
        (dtype is torch.bfloat16 or dtype is torch.float32)
        and k.dtype is cos.dtype is sin.dtype is dtype
        and strides[1:] == k_strides[1:] == (head_size, 1)
        and k_shape[0] == num_tokens
        and k_shape[2] == head_size
        and cos_shape in ((num_tokens, size), (1, num_tokens, size))
        and sin.shape == cos_shape
        and cos_strides[-1] == sin_strides[-1] == 1
        and size % 2 == 0
        and size <= head_size
        and size <= _MAX_TURNED
    ):
        return reference.rotary(q, k, cos, sin)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k_shape)
    turn(
        q_out,
        k_out,
        None,
        q,
        k,
        None,
        cos,
        sin,
        None,
        num_tokens,
        num_heads,
        k_shape[1],
        head_size,
        size,
        0,
        strides[0],
        k_strides[0],
        0,
        cos_strides[-2],
        sin_strides[-2],
        torch.get_num_threads(),
        dtype is torch.bfloat16,
    )
    return q_out, k_out


def _rotary_write_kv_cache(
    turn: Callable[..., None],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    dtype, (num_tokens, num_heads, head_size), k_shape = q.dtype, q.shape, k.shape
    strides, k_strides, v_strides, cos_strides, sin_strides = (
        q.stride(),
        k.stride(),
        v.stride(),
        cos.stride(),
        sin.stride(),
    )
    num_blocks, block_size, num_kv_heads, _ = cache_shape = k_cache.shape
    cos_shape = cos.shape
    size = cos_shape[-1]
    if not (
        (dtype is torch.bfloat16 or dtype is torch.float32)
        and k.dtype is v.dtype is cos.dtype is sin.dtype is k_cache.dtype is v_cache.dtype is dtype
        and strides[1:] == k_strides[1:] == v_strides[1:] == (head_size, 1)
        and k_shape == (num_tokens, num_kv_heads, cache_shape[3])
        and k_shape[2] == head_size
        and v.shape == k_shape
        and cos_shape in ((num_tokens, size), (1, num_tokens, size))
        and sin.shape == cos_shape
        and cos_strides[-1] == sin_strides[-1] == 1
        and size % 2 == 0
        and size <= head_size
        and size <= _MAX_TURNED
        and v_cache.shape == cache_shape
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and slot_mapping.dtype is torch.int64
        and slot_mapping.shape[0] == num_tokens
        and slot_mapping.is_contiguous()
    ):
        return reference.rotary_write_kv_cache(q, k, v, cos, sin, k_cache, v_cache, slot_mapping)
    if out is None:
        out = q.new_empty(q.shape)
    turn(
        out,
        k_cache,
        v_cache,
        q,
        k,
        v,
        cos,
        sin,
        slot_mapping,
        num_tokens,
        num_heads,
        num_kv_heads,
        head_size,
        size,
        num_blocks * block_size,
        strides[0],
        k_strides[0],
        v_strides[0],
        cos_strides[-2],
        sin_strides[-2],
        torch.get_num_threads(),
        dtype is torch.bfloat16,
    )
    return out
