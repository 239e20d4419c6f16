"""`onegraph::write_kv_cache`: puts the keys and values of a step's tokens into the paged KV cache, in place.

Letters: T tokens, K key-value heads, D head size, N blocks, B block size.
"""

from __future__ import annotations

import torch

from onegraph.ops.library import define


def write_kv_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes `k` and `v` [T, K, D] at the slots [T] (int64) of the caches [N, B, K, D].

    Slot s is place s % B of block s // B. A slot of -1 is a padded row and is left out.
    """
    if bool((slot_mapping < 0).any()):
        rows = (slot_mapping >= 0).nonzero().flatten()
        k, v, slot_mapping = k[rows], v[rows], slot_mapping[rows]
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slot_mapping, new.to(cache.dtype))


def _fake(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    return None


define(
    "write_kv_cache(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()",
    write_kv_cache,
    _fake,
)
