"""`onegraph::paged_attention`: attention of a flat batch of requests over a paged KV cache. The reference.

Prefill and decode mix in one batch; query heads share key-value heads; windows, soft-capping and sinks are
options. Plain PyTorch, softmax in fp32 (fp64 for fp64 inputs).

Letters: T tokens, R requests, H query heads, K key-value heads, G = H / K, D head size, N blocks, B block size,
M most blocks of a request, L context length, Q new tokens of one request.
"""

from __future__ import annotations

import torch

from onegraph.ops.library import define

QUERY_TILE = 512
"""Queries of one request whose scores are held at a time."""


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
    the new tokens. `sliding_window` w lets position p see positions p - w + 1..p; `logit_softcap` c turns
    scores s into c * tanh(s / c); `sinks` [H] adds one logit to each softmax that takes weight and gives no
    value. Rows that no request owns are padding, and their outputs are zero. Returns [T, H, D].
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    decoding = [r for r, length in enumerate(lengths) if starts[r + 1] - starts[r] == 1 and length > 0]
    if decoding:
        rows = torch.tensor([starts[r] for r in decoding])
        longest = max(lengths[r] for r in decoding)
        blocks = block_tables[torch.tensor(decoding), : -(-longest // k_cache.shape[1])]
        keys, values = _gather(k_cache, blocks, longest), _gather(v_cache, blocks, longest)
        positions = seq_lens[torch.tensor(decoding)].long()[:, None] - 1
        out[rows] = _attend(q[rows][:, None], keys, values, positions, scale, sliding_window, logit_softcap, sinks)[
            :, 0
        ]
    for r, length in enumerate(lengths):
        first, last = starts[r], starts[r + 1]
        if last - first < 2:
            continue
        blocks = block_tables[r : r + 1, : -(-length // k_cache.shape[1])]
        keys, values = _gather(k_cache, blocks, length), _gather(v_cache, blocks, length)
        for tile in range(first, last, QUERY_TILE):
            end = min(tile + QUERY_TILE, last)
            positions = torch.arange(length - last + tile, length - last + end)[None]
            out[tile:end] = _attend(
                q[None, tile:end], keys, values, positions, scale, sliding_window, logit_softcap, sinks
            )[0]
    return out


def _gather(cache: torch.Tensor, blocks: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` keys or values of each request: [requests, length, K, D]."""
    return cache[blocks.long()].flatten(1, 2)[:, :length]


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    logit_softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention over gathered keys: q [R, Q, H, D], keys and values [R, L, K, D], positions [R, Q]."""
    requests, queries, heads, size = q.shape
    shared = keys.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(dtype).view(requests, queries, shared, heads // shared, size).permute(0, 2, 3, 1, 4)
    scores = grouped.flatten(2, 3) @ keys.to(dtype).permute(0, 2, 3, 1)  # [R, K, G * Q, L]
    scores = scores.view(requests, shared, heads // shared, queries, -1) * scale
    if logit_softcap is not None:
        scores = torch.tanh(scores / logit_softcap) * logit_softcap
    key_positions = torch.arange(keys.shape[1])
    hidden = key_positions > positions[..., None]
    if sliding_window is not None:
        hidden |= key_positions <= positions[..., None] - sliding_window
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
