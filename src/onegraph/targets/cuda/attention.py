"""`onegraph::paged_attention` and `onegraph::write_kv_cache` on CUDA: Triton kernels behind the ops.

Gives an implementation for each op. What the kernels don't do (fp64, layouts that nothing of ours makes) is left to the
reference in `ops`, which waits for the device. Launches depend on sizes alone, so they can be recorded.

Letters: as in `kernels.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from onegraph.env import environment
from onegraph.ops import attention, kv_cache
from onegraph.targets.cuda.launch import kernels, launch
from onegraph.targets.cuda.varlen import torch_attention

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST = 16
"""What tensor cores multiply at least, in each direction."""
_FAR = 1 << 30
"""Tokens of a window that nobody sees the end of; numbers of kernels have 32 bits."""
_SPLIT = 256
"""Keys that a program of a split context gets at least."""


def implementations() -> dict[str, Callable[..., Any]]:
    """By op name; each is called with CUDA tensors as its op's schema says. Raises ImportError without Triton.

    Attention is torch's own where ONEGRAPH_ATTENTION=torch asks for it: ConfigError where this torch can't.
    """
    kernels()
    attends = torch_attention(paged_attention) if environment().attention == "torch" else paged_attention
    return {"paged_attention": attends, "write_kv_cache": write_kv_cache}


def paged_attention(
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
) -> torch.Tensor:
    """See `ops.attention.paged_attention`."""
    if not _is_ours(q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, logit_softcap, sinks):
        return attention.paged_attention(
            q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, scale, sliding_window, logit_softcap, sinks
        )
    attention.check_window(sliding_window)
    (num_tokens, num_heads, head_dim), (_, block_size, num_kv_heads, _) = q.shape, k_cache.shape
    num_requests, max_blocks = block_tables.shape
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # padding rows stay zero
    if not (num_tokens and num_requests):
        return out
    group, padded = num_heads // num_kv_heads, _power_of_two(max(head_dim, _LEAST))
    wide = q.dtype is torch.float32 or padded > 128
    numbers = (scale, logit_softcap or 0.0, min(sliding_window or 0, _FAR))
    sizes: dict[str, Any] = {"H": num_heads, "D": head_dim, "DP": padded, "HAS_SINKS": sinks is not None}
    options: dict[str, Any] = {
        "G": group,
        "B": block_size,
        "BLOCK_N": 32 if wide else 64,
        "HAS_CAP": logit_softcap is not None,
        "HAS_WINDOW": sliding_window is not None,
        "PRECISION": "ieee" if q.dtype is torch.float32 else "tf32",  # the latter says nothing of 16 bits
    }
    strides = (q.stride(0), q.stride(1), block_tables.stride(0))
    given = (q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, out if sinks is None else sinks)
    compiled_for = (q.dtype, strides[:2], q.device)
    start = functools.partial(launch, specialised=compiled_for, aligned=(q, k_cache, v_cache))
    with _on(q.device):
        is_mixed = num_tokens > num_requests
        splits = _num_splits(num_requests * num_kv_heads, max_blocks * block_size, q.device)
        partial = state = out
        if splits > 1:
            partial = q.new_empty((num_tokens, num_heads, splits, padded), dtype=torch.float32)
            state = q.new_empty((num_tokens, num_heads, splits, 2), dtype=torch.float32)
        start(
            "decode",
            (num_requests, num_kv_heads, splits),
            (out, partial, state, *given, *strides, splits, *numbers),
            {
                **sizes,
                **options,
                "GP": _power_of_two(max(group, _LEAST)),
                "IS_SPLIT": splits > 1,
                "ONLY_SINGLE": is_mixed,
            },
        )
        if splits > 1:
            start(
                "combine_splits",
                (num_requests, num_heads, 1),
                (out, partial, state, query_start_loc, given[-1], splits),
                {**sizes, "ONLY_SINGLE": is_mixed},
                num_warps=2,
            )
        if is_mixed:
            together = _power_of_two(group)
            tokens = max(1, (32 if wide else 64) // together)
            tokens = max(tokens, _LEAST // together)
            start(
                "prefill",
                (num_tokens // tokens + num_requests, num_kv_heads, 1),
                (out, *given, *strides, num_requests, *numbers),
                {**sizes, **options, "GP": together, "BLOCK_T": tokens},
            )
    return out


def write_kv_cache(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """See `ops.kv_cache.write_kv_cache`."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    if not (
        k.shape == v.shape == (len(slot_mapping), num_kv_heads, head_dim)
        and v_cache.shape == k_cache.shape
        and k.dtype in _DTYPES
        and v.dtype is k.dtype
        and k_cache.dtype in _DTYPES
        and v_cache.dtype is k_cache.dtype
        and k.stride(2) == v.stride(2) == 1
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and slot_mapping.dtype is torch.int64
        and slot_mapping.is_contiguous()
    ):
        return kv_cache.write_kv_cache(k, v, k_cache, v_cache, slot_mapping)
    size = min(_power_of_two(num_kv_heads * head_dim), 1024)
    if len(slot_mapping):
        strides = (*k.stride()[:2], *v.stride()[:2])
        with _on(k.device):
            launch(
                "write_cache",
                (len(slot_mapping), -(-(num_kv_heads * head_dim) // size), 1),
                (k, v, k_cache, v_cache, slot_mapping, *strides),
                {"K": num_kv_heads, "D": head_dim, "SIZE": size},
                specialised=(k.dtype, k_cache.dtype, strides, k.device),
                aligned=(k, v, k_cache, v_cache),
            )
    return None


def _is_ours(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    logit_softcap: float | None,
    sinks: torch.Tensor | None,
) -> bool:
    dtype = q.dtype
    return (
        dtype in _DTYPES
        and k_cache.dtype is v_cache.dtype is dtype
        and q.stride(2) == 1
        and q.shape[2] <= 256
        and v_cache.shape == k_cache.shape
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and block_tables.dtype is query_start_loc.dtype is seq_lens.dtype is torch.int32
        and block_tables.stride(1) == 1
        and query_start_loc.is_contiguous()
        and seq_lens.is_contiguous()
        and (sinks is None or (sinks.dtype is dtype and sinks.is_contiguous()))
        and logit_softcap != 0
    )


def _power_of_two(number: int) -> int:
    """The least that isn't smaller."""
    return 1 << (number - 1).bit_length()


def _num_splits(num_programs: int, max_context: int, device: torch.device) -> int:
    """Into how many parts a context is cut so that each multiprocessor gets work; by sizes that the host knows."""
    fill = max(1, 2 * _num_multiprocessors(device) // num_programs)
    return max(1, min(fill, max_context // _SPLIT))


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 8  # Triton's interpreter, on the CPU


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
