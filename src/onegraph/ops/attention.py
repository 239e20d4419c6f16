"""`onegraph::paged_attention`: attention of a flat batch of requests over a paged KV cache. The reference.

Prefill and decode mix in one batch; query heads share key-value heads; windows, soft-capping and sinks are
options. Plain PyTorch, softmax in fp32 (fp64 for fp64 inputs).

Letters: T tokens, R requests, H query heads, K key-value heads, G = H / K, D head size, N blocks, B block size,
M most blocks of a request, L context length, Q new tokens of one request.
"""

from __future__ import annotations

from collections import defaultdict

import torch

from onegraph.ops.library import define

SCORES_AT_ONCE = 1 << 24
"""Scores of one request (queries by heads by context) that are held at a time, where more queries wait."""


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
    """Causal attention of each request's new tokens over its context.

    q [T, H, D]; k_cache, v_cache [N, B, K, D], holding the new tokens too; block_tables int32 [R, M];
    query_start_loc int32 [R + 1]: request r owns rows start[r]..start[r + 1]; seq_lens int32 [R]: context with
    the new tokens. `sliding_window` w >= 1 lets position p see positions p - w + 1..p; `logit_softcap` c turns
    scores s into c * tanh(s / c); `sinks` [H] adds one logit to each softmax that takes weight and gives no
    value. Rows that no request owns are padding, and their outputs are zero. Returns [T, H, D].

    Requests with one new token are computed together with those whose contexts round up to the same power of two
    of blocks. So a request's shapes follow from its own length and not from its batch-mates', and nothing that lies
    in the cache beyond its context (where there may be NaN) reaches it.
    """
    check_window(sliding_window)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    block_size, device = k_cache.shape[1], q.device
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    together: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for r, length in enumerate(lengths):
        first, last = starts[r], starts[r + 1]
        if last == first:
            continue
        oldest = 0 if sliding_window is None else max(0, length - (last - first) - sliding_window + 1)
        first_block, end_block = oldest // block_size, -(-length // block_size)
        if last - first == 1:
            together[(end_block - first_block - 1).bit_length()].append((r, first_block, end_block))
            continue
        blocks = block_tables[r, first_block:end_block].long()
        begin = first_block * block_size
        keys, values = (cache[blocks].flatten(0, 1)[None, : length - begin] for cache in (k_cache, v_cache))
        places = torch.arange(begin, length, device=device)[None]
        tile = max(1, SCORES_AT_ONCE // (q.shape[1] * length))
        for at in range(first, last, tile):
            end = min(at + tile, last)
            seen = length - last + end - begin
            out[at:end] = _attend(
                q[None, at:end],
                keys[:, :seen],
                values[:, :seen],
                torch.arange(length - last + at, length - last + end, device=device)[None],
                places[:, :seen],
                scale,
                sliding_window,
                logit_softcap,
                sinks,
            )[0]
    for log_blocks, members in together.items():
        requests, first_blocks, end_blocks = torch.tensor(members, device=device).unbind(1)
        columns = first_blocks[:, None] + torch.arange(1 << log_blocks, device=device)
        blocks = block_tables[requests[:, None], columns.minimum(end_blocks[:, None] - 1)].long()
        keys, values = k_cache[blocks].flatten(1, 2), v_cache[blocks].flatten(1, 2)
        places = first_blocks[:, None] * block_size + torch.arange(keys.shape[1], device=device)
        positions = seq_lens[requests].long()[:, None] - 1
        values.masked_fill_((places > positions)[..., None, None], 0)  # a weight of 0 wouldn't do: 0 * NaN is NaN
        rows = query_start_loc[requests].long()
        out[rows] = _attend(
            q[rows][:, None], keys, values, positions, places, scale, sliding_window, logit_softcap, sinks
        )[:, 0]
    return out


def check_window(sliding_window: int | None) -> None:
    """Raises ValueError for a window in which a token wouldn't see itself."""
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window is {sliding_window}, and less than 1")


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    places: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    logit_softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention over gathered keys: q [R, Q, H, D], keys and values [R, L, K, D].

    The queries stand at `positions` [R, Q], the keys at `places` [R, L].
    """
    requests, queries, heads, size = q.shape
    shared = keys.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(dtype).view(requests, queries, shared, heads // shared, size).permute(0, 2, 3, 1, 4)
    scores = grouped.flatten(2, 3) @ keys.to(dtype).permute(0, 2, 3, 1)  # [R, K, G * Q, L]
    scores = scores.view(requests, shared, heads // shared, queries, -1) * scale
    if logit_softcap is not None:
        scores = torch.tanh(scores / logit_softcap) * logit_softcap
    hidden = places[:, None] > positions[..., None]
    if sliding_window is not None:
        hidden |= places[:, None] <= positions[..., None] - sliding_window
    scores.masked_fill_(hidden[:, None, None], float("-inf"))
    if sinks is not None:
        sink = sinks.to(dtype).view(1, shared, heads // shared, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out = weights.flatten(2, 3) @ values.to(dtype).permute(0, 2, 1, 3)  # [R, K, G * Q, D]
    out = out.view(requests, shared, heads // shared, queries, size).permute(0, 3, 1, 2, 4)
    return out.reshape(requests, queries, heads, size).to(q.dtype)


def _fake(
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
    return q.new_empty(q.shape)


define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor query_start_loc, "
    "Tensor seq_lens, float scale, int? sliding_window, float? logit_softcap, Tensor? sinks) -> Tensor",
    paged_attention,
    _fake,
)
