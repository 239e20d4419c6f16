"""`onegraph::paged_attention` by PyTorch's own variable-length attention over a paged cache.

Has not been run on a GPU, so it is used where ONEGRAPH_ATTENTION=torch asks for it, and for what it can do; Triton's
kernels do the rest. Torch documents block tables from 2.13 on, by FlashAttention; of the one that it ships the source
says that blocks have to be a multiple of 256 tokens.

Letters: as in `kernels.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from onegraph.errors import ConfigError

_NEEDED = ("block_table", "seqused_k", "window_size", "scale", "enable_gqa")
_BLOCK = 256
_DTYPES = (torch.bfloat16, torch.float16)

Attention = Callable[..., torch.Tensor]


def missing() -> str | None:
    """Why this torch can't; None where its interface has what is needed."""
    try:
        from torch.nn.attention.varlen import varlen_attn_out
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn_out"
    lacks = [name for name in _NEEDED if name not in inspect.signature(varlen_attn_out).parameters]
    return f"varlen_attn_out of torch {torch.__version__} has no {lacks[0]}" if lacks else None


def torch_attention(own: Attention) -> Attention:
    """Torch's attention, with `own` for calls that it can't do. Raises ConfigError where this torch can't at all."""
    problem = missing()
    if problem is not None:
        raise ConfigError(
            f"ONEGRAPH_ATTENTION=torch, but {problem}", where="ONEGRAPH_ATTENTION", hint="leave it out, or update torch"
        )

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
        given = (q, k_cache, v_cache, block_tables, query_start_loc, seq_lens, scale)
        if not can(q, logit_softcap, sinks, sliding_window) or not (len(q) and len(seq_lens)):
            return own(*given, sliding_window, logit_softcap, sinks)
        return attend(*given, sliding_window)

    return paged_attention


def can(q: torch.Tensor, logit_softcap: float | None, sinks: torch.Tensor | None, sliding_window: int | None) -> bool:
    """Whether FlashAttention has what a call asks for."""
    is_plain = logit_softcap is None and sinks is None and (sliding_window is None or sliding_window > 0)
    return is_plain and q.dtype in _DTYPES and q.shape[2] % 8 == 0 and q.shape[2] <= 256


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """See `ops.attention.paged_attention`. Launches depend on sizes alone: no query is longer than all of them.

    Raises ConfigError for a cache whose blocks FlashAttention doesn't take.
    """
    from torch.nn.attention.varlen import varlen_attn_out

    block_size, num_kv_heads = k_cache.shape[1:3]
    if block_size % _BLOCK:
        raise ConfigError(
            f"ONEGRAPH_ATTENTION=torch needs blocks of a multiple of {_BLOCK} tokens, and they have {block_size}",
            where="ONEGRAPH_ATTENTION",
            hint=f"give block_size={_BLOCK}, or leave it out",
        )
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # padding rows stay zero
    ends = torch.cumsum(seq_lens, 0, dtype=torch.int32)
    window: tuple[int, int] = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    options: dict[str, Any] = {"scale": scale, "window_size": window, "enable_gqa": q.shape[1] != num_kv_heads}
    varlen_attn_out(
        out,
        q,
        k_cache,
        v_cache,
        query_start_loc,
        torch.nn.functional.pad(ends, (1, 0)),
        len(q),
        block_tables.shape[1] * block_size,
        seqused_k=seq_lens,
        block_table=block_tables,
        **options,
    )
    return out
