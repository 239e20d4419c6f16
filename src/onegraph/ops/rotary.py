"""`onegraph::rotary`: rotary position embedding of queries and keys, alone and with the write into the KV cache.

The first R elements of a head turn, in pairs whose halves lie R / 2 apart (Su et al., arXiv 2104.09864, in the layout
of GPT-NeoX); the others stay.

Letters: T tokens, H query heads, K key-value heads, D head size, R the part of it that turns, N blocks, B block size.
"""

from __future__ import annotations

import torch

from onegraph.ops.kv_cache import write_kv_cache
from onegraph.ops.library import define


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`q` [T, H, D] and `k` [T, K, D], turned, in new memory; `cos` and `sin` are [T, R] or [1, T, R], of one dtype."""
    return _turned(q, cos, sin), _turned(k, cos, sin)


def rotary_write_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """The turned `q` of `rotary`; the turned `k`, and `v`, are written as `write_kv_cache` does."""
    write_kv_cache(_turned(k, cos, sin), v, k_cache, v_cache, slot_mapping)
    return _turned(q, cos, sin)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    size = cos.shape[-1]
    cos, sin = cos.reshape(-1, 1, size), sin.reshape(-1, 1, size)
    turning, rest = x[..., :size], x[..., size:]
    first, second = turning.chunk(2, -1)
    return torch.cat((turning * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def _fake(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    return q.new_empty(q.shape)


define("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", rotary, _fake)
define(
    "rotary_write_kv_cache(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor slot_mapping) -> Tensor",
    rotary_write_kv_cache,
    _fake_write,
)
