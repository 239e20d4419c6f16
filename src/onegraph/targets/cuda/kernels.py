"""Triton kernels for attention over a paged KV cache, and for writing it.

Each program works for one key-value head and the G query heads that share it. Where programs are cut follows from
sizes that the host knows and, inside, from a request's own length; nothing here waits for the host, so a launch can be
recorded. Softmax is online and in fp32, as in FlashAttention-2 (Dao, 2023); a decoding request's context is split among
programs and put together by `combine_splits`, as in Flash-Decoding (Dao et al., 2023).

Letters: T tokens, R requests, H query heads, K key-value heads, G = H / K, GP = G padded to a power of two, D head
size, DP = D padded, B block size, S splits of a context.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _soft_cap(scores, softcap):
    """softcap * tanh(scores / softcap)."""
    return softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))


@triton.jit
def _attend_block(
    q, acc, best, total, k_cache, v_cache, table, kv_head, start, end, oldest, positions, scale, softcap, window,
    B: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys `start`..`start + BLOCK_N`: those from `oldest` to before `end` count.

    q [M, DP] at `positions` [M]; acc [M, DP], best [M] and total [M] are its state, in fp32.
    """
    places = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, DP)
    exists = (places >= oldest) & (places < end)
    blocks = tl.load(table + places // B, mask=exists, other=0).to(tl.int64)
    rows = ((blocks * B + places % B) * K + kv_head) * D
    inside = exists[:, None] & (dims < D)[None, :]
    keys = tl.load(k_cache + rows[:, None] + dims[None, :], mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    if HAS_CAP:
        scores = _soft_cap(scores, softcap)
    seen = exists[None, :] & (places[None, :] <= positions[:, None])
    if HAS_WINDOW:
        seen &= places[None, :] > positions[:, None] - window
    scores = tl.where(seen, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)  # rows that have seen nothing yet
    weights = tl.exp(scores - shift[:, None])
    fade = tl.exp(best - shift)
    values = tl.load(v_cache + rows[:, None] + dims[None, :], mask=inside, other=0.0)
    acc = acc * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return acc, new_best, total * fade + tl.sum(weights, 1)


@triton.jit
def _with_sink(best, total, sinks, heads, valid):
    """The state of the softmax with one logit more, for each row's head; gives the new maximum, and the total."""
    sink = tl.load(sinks + heads, mask=valid, other=float("-inf")).to(tl.float32)
    new_best = tl.maximum(best, sink)
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    return new_best, total * tl.exp(best - shift) + tl.exp(sink - shift)


@triton.jit(
    do_not_specialize=["table_stride", "num_splits", "window"],
    do_not_specialize_on_alignment=["tables", "starts", "lengths", "sinks"],
)
def decode(
    out, partial, state, q, k_cache, v_cache, tables, starts, lengths, sinks,
    q_stride_t, q_stride_h, table_stride, num_splits, scale, softcap, window,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, B: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    IS_SPLIT: tl.constexpr, ONLY_SINGLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (r, k, s): one token after the other of request r, over split s of its context.

    With ONLY_SINGLE, requests of more tokens are left out. With IS_SPLIT, partial [T, H, S, DP] gets sums that are not
    normalised, and state [T, H, S, 2] their maxima and totals; else out [T, H, D] the result.
    """
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = tl.load(starts + request), tl.load(starts + request + 1)
    if ONLY_SINGLE:
        if last - first != 1:
            return
    length = tl.load(lengths + request)
    table = tables + request.to(tl.int64) * table_stride
    members, dims = tl.arange(0, GP), tl.arange(0, DP)
    heads = kv_head * G + members
    valid = members < G
    for token in range(first, last):
        position = length - last + token
        oldest = 0
        if HAS_WINDOW:
            oldest = tl.maximum(0, position - window + 1)
        begin, end = oldest, position + 1
        if IS_SPLIT:
            share = tl.cdiv(tl.cdiv(end - oldest, num_splits), BLOCK_N) * BLOCK_N
            begin = oldest + split * share
            end = tl.minimum(begin + share, end)
        row = first.to(tl.int64) + (token - first)
        whole = valid[:, None] & (dims < D)[None, :]
        queries = tl.load(q + row * q_stride_t + heads[:, None] * q_stride_h + dims[None, :], mask=whole, other=0.0)
        acc = tl.zeros([GP, DP], tl.float32)
        best = tl.full([GP], float("-inf"), tl.float32)
        total = tl.zeros([GP], tl.float32)
        positions = tl.full([GP], 0, tl.int32) + position
        for start in range(begin, end, BLOCK_N):
            acc, best, total = _attend_block(
                queries, acc, best, total, k_cache, v_cache, table, kv_head, start, end, begin, positions,
                scale, softcap, window, B, H // G, D, DP, BLOCK_N, HAS_CAP, HAS_WINDOW, PRECISION,
            )  # fmt: skip
        if IS_SPLIT:
            place = (row * H + heads) * num_splits + split
            tl.store(partial + place[:, None] * DP + dims[None, :], acc, mask=valid[:, None])
            tl.store(state + place * 2, best, mask=valid)
            tl.store(state + place * 2 + 1, total, mask=valid)
        else:
            own = best
            if HAS_SINKS:
                best, total = _with_sink(best, total, sinks, heads, valid)
            acc = acc * (tl.exp(own - best) / total)[:, None]
            tl.store(out + (row * H + heads[:, None]) * D + dims[None, :], acc.to(out.dtype.element_ty), mask=whole)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["starts", "sinks"])
def combine_splits(
    out, partial, state, starts, sinks, num_splits,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HAS_SINKS: tl.constexpr, ONLY_SINGLE: tl.constexpr,
):  # fmt: skip
    """Program (r, h): out [T, H, D] of request r's tokens and head h, from what `decode` left of the splits."""
    request, head = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(starts + request), tl.load(starts + request + 1)
    if ONLY_SINGLE:
        if last - first != 1:
            return
    dims = tl.arange(0, DP)
    for token in range(first, last):
        row = (first.to(tl.int64) + (token - first)) * H + head
        acc = tl.zeros([DP], tl.float32)
        best = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        for split in range(num_splits):
            place = row * num_splits + split
            own, weight = tl.load(state + place * 2), tl.load(state + place * 2 + 1)
            new_best = tl.maximum(best, own)
            shift = tl.where(new_best == float("-inf"), 0.0, new_best)
            fade, gain = tl.exp(best - shift), tl.exp(own - shift)
            acc = acc * fade + tl.load(partial + place * DP + dims) * gain
            total = total * fade + weight * gain
            best = new_best
        if HAS_SINKS:
            own = best
            sink = tl.load(sinks + head).to(tl.float32)
            best = tl.maximum(own, sink)
            total = total * tl.exp(own - best) + tl.exp(sink - best)
            acc = acc * tl.exp(own - best)
        tl.store(out + row * D + dims, (acc / total).to(out.dtype.element_ty), mask=dims < D)


@triton.jit(
    do_not_specialize=["table_stride", "num_requests", "window"],
    do_not_specialize_on_alignment=["tables", "starts", "lengths", "sinks"],
)
def prefill(
    out, q, k_cache, v_cache, tables, starts, lengths, sinks,
    q_stride_t, q_stride_h, table_stride, num_requests, scale, softcap, window,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, B: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, k): the i-th tile of BLOCK_T tokens. Request r's tiles begin at number start[r] // BLOCK_T + r.

    So tiles are found without a table of them; some are empty. Requests of one token are `decode`'s.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    low, high = tile * 0, tile * 0 + num_requests  # the last request whose first tile isn't behind this one
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // BLOCK_T + middle <= tile:
            low = middle
        else:
            high = middle
    first, last = tl.load(starts + low), tl.load(starts + low + 1)
    begin = first + (tile - (first // BLOCK_T + low)) * BLOCK_T
    if (begin >= last) | (last - first == 1):
        return
    length = tl.load(lengths + low)
    table = tables + low.to(tl.int64) * table_stride
    rows, dims = tl.arange(0, BLOCK_T * GP), tl.arange(0, DP)
    tokens = begin + rows // GP
    heads = kv_head * G + rows % GP
    valid = (tokens < last) & (rows % GP < G)
    whole = valid[:, None] & (dims < D)[None, :]
    places = tokens.to(tl.int64)[:, None]
    queries = tl.load(q + places * q_stride_t + heads[:, None] * q_stride_h + dims[None, :], mask=whole, other=0.0)
    positions = length - last + tokens
    end = tl.minimum(length - last + begin + BLOCK_T, length)
    oldest = 0
    if HAS_WINDOW:
        oldest = tl.maximum(0, length - last + begin - window + 1)
    acc = tl.zeros([BLOCK_T * GP, DP], tl.float32)
    best = tl.full([BLOCK_T * GP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T * GP], tl.float32)
    for start in range(oldest, end, BLOCK_N):
        acc, best, total = _attend_block(
            queries, acc, best, total, k_cache, v_cache, table, kv_head, start, end, oldest, positions,
            scale, softcap, window, B, H // G, D, DP, BLOCK_N, HAS_CAP, HAS_WINDOW, PRECISION,
        )  # fmt: skip
    own = best
    if HAS_SINKS:
        best, total = _with_sink(best, total, sinks, heads, valid)
    acc = acc * (tl.exp(own - best) / total)[:, None]
    tl.store(out + (places * H + heads[:, None]) * D + dims[None, :], acc.to(out.dtype.element_ty), mask=whole)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def write_cache(
    k, v, k_cache, v_cache, slots, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    K: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Program (t, c): SIZE elements of token t's keys and values, to its slot; none for a slot below zero."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    places = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = places < K * D
    head, dim = places // D, places % D
    keys = tl.load(k + token * k_stride_t + head * k_stride_h + dim, mask=inside)
    values = tl.load(v + token * v_stride_t + head * v_stride_h + dim, mask=inside)
    tl.store(k_cache + slot * (K * D) + places, keys.to(k_cache.dtype.element_ty), mask=inside)
    tl.store(v_cache + slot * (K * D) + places, values.to(v_cache.dtype.element_ty), mask=inside)
