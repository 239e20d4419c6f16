"""The references of attention and the cache write against a naive dense computation in fp64, over random batches."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from onegraph.ops.attention import SCORES_AT_ONCE, paged_attention
from onegraph.ops.kv_cache import write_kv_cache

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass
class Batch:
    """Random requests in a paged cache whose blocks are shuffled, with a few rows of padding at the end."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    contexts: list[tuple[torch.Tensor, torch.Tensor]]


def make_batch(seed: int, dtype: torch.dtype, *, padding: int = 2) -> Batch:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shared, group, size, block = (
        rng.choice([1, 2, 3]),
        rng.choice([1, 2, 4]),
        rng.choice([4, 16]),
        rng.choice([1, 4, 16]),
    )
    requests = [(rng.choice([1, 1, 2, 7, 20]), rng.choice([0, 0, 3, 30])) for _ in range(rng.randint(1, 5))]
    blocks = [-(-(new + old) // block) for new, old in requests]
    order = list(range(1, sum(blocks) + 3))
    rng.shuffle(order)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    total = sum(new for new, _ in requests) + padding
    q, k, v = draw(total, shared * group, size), draw(total, shared, size), draw(total, shared, size)
    caches = [draw(len(order) + 1, block, shared, size) for _ in range(2)]
    tables = torch.zeros(len(requests), max(blocks), dtype=torch.int32)
    slots, starts, lengths, contexts = [], [0], [], []
    for r, (new, old) in enumerate(requests):
        own = [order.pop() for _ in range(blocks[r])]
        tables[r, : len(own)] = torch.tensor(own, dtype=torch.int32)
        places = [own[p // block] * block + p % block for p in range(new + old)]
        slots += places[old:]
        rows = slice(starts[-1], starts[-1] + new)
        past = [cache.view(-1, shared, size)[places[:old]] for cache in caches]
        contexts.append((torch.cat([past[0], k[rows]]), torch.cat([past[1], v[rows]])))
        starts.append(starts[-1] + new)
        lengths.append(new + old)
    return Batch(
        q, k, v, *caches, torch.tensor(slots + [-1] * padding), tables,
        torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), contexts,
    )  # fmt: skip


def naive(
    batch: Batch, scale: float, window: int | None, softcap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """One query, one head at a time."""
    out = torch.zeros(batch.q.shape, dtype=torch.float64)
    for r, (keys, values) in enumerate(batch.contexts):
        first, last = int(batch.starts[r]), int(batch.starts[r + 1])
        for row in range(first, last):
            position = len(keys) - (last - row)
            oldest = 0 if window is None else max(0, position - window + 1)
            for head in range(batch.q.shape[1]):
                kv = head // (batch.q.shape[1] // keys.shape[1])
                seen = slice(oldest, position + 1)
                scores = keys[seen, kv].double() @ batch.q[row, head].double() * scale
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head].double()[None]])
                weights = scores.softmax(0)[: position + 1 - oldest]
                out[row, head] = weights @ values[seen, kv].double()
    return out


def attend(batch: Batch, scale: float, window: int | None, softcap: float | None, sinks: Any) -> torch.Tensor:
    write_kv_cache(batch.k, batch.v, batch.k_cache, batch.v_cache, batch.slots)
    out: torch.Tensor = paged_attention(
        batch.q, batch.k_cache, batch.v_cache, batch.tables, batch.starts, batch.lengths, scale, window, softcap, sinks
    )
    return out


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_attention_equals_the_naive_computation(seed: int, dtype: torch.dtype) -> None:
    batch = make_batch(seed, dtype)
    window, softcap = [None, 1, 5, 16][seed % 4], [None, None, 2.0][seed % 3]
    sinks = (
        torch.randn(batch.q.shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
        if seed % 5 == 0
        else None
    )
    scale = 1 / math.sqrt(batch.q.shape[2])
    out = attend(batch, scale, window, softcap, sinks)
    assert out.dtype == dtype and out.is_contiguous()
    assert (out.double() - naive(batch, scale, window, softcap, sinks)).abs().max() < TOLERANCE[dtype]
    assert out[int(batch.starts[-1]) :].abs().sum() == 0, "padded rows are zero"


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_options_in_every_combination(window: int | None, softcap: float | None, with_sinks: bool) -> None:
    batch = make_batch(21, torch.float64)
    sinks = torch.linspace(-2, 2, batch.q.shape[1], dtype=torch.float64) if with_sinks else None
    out = attend(batch, 0.3, window, softcap, sinks)
    assert (out - naive(batch, 0.3, window, softcap, sinks)).abs().max() < TOLERANCE[torch.float64]


@pytest.mark.parametrize("window", [None, 700])
def test_a_prompt_whose_scores_do_not_fit_at_once(window: int | None) -> None:
    """So many queries, heads and keys that they are computed in tiles; the naive form here holds all scores."""
    tokens, heads, size, block = 1600, 8, 4, 16
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, size, generator=generator) for _ in range(3))
    caches = [torch.zeros(tokens // block + 1, block, heads, size) for _ in range(2)]
    table = torch.randperm(tokens // block, generator=generator)[None].int() + 1
    places = torch.arange(tokens)
    slots = table[0].long()[places // block] * block + places % block
    write_kv_cache(k, v, *caches, slots)
    assert tokens * tokens * heads > SCORES_AT_ONCE
    starts, lengths = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    out = paged_attention(q, *caches, table, starts, lengths, 0.5, window, None, None)
    hidden = places[None] > places[:, None]
    if window is not None:
        hidden |= places[None] <= places[:, None] - window
    for head in range(heads):
        scores = (q[:, head].double() @ k[:, head].double().T * 0.5).masked_fill(hidden, -torch.inf)
        wanted = scores.softmax(-1) @ v[:, head].double()
        assert (out[:, head] - wanted).abs().max() < TOLERANCE[torch.float32]


def test_requests_without_new_tokens_and_strided_queries() -> None:
    """Queries as a fused projection leaves them; a request that waits stands between two that run."""
    batch = make_batch(7, torch.float32)
    wanted = attend(batch, 0.5, None, None, None)
    wide = torch.randn(batch.q.shape[0], batch.q.shape[1], 2 * batch.q.shape[2])
    wide[..., : batch.q.shape[2]] = batch.q
    q = wide[..., : batch.q.shape[2]]
    assert not q.is_contiguous()
    middle = len(batch.lengths) // 2
    starts = torch.cat([batch.starts[: middle + 1], batch.starts[middle:]])
    lengths = torch.cat([batch.lengths[:middle], torch.tensor([5], dtype=torch.int32), batch.lengths[middle:]])
    tables = torch.cat([batch.tables[:middle], torch.zeros_like(batch.tables[:1]), batch.tables[middle:]])
    out = paged_attention(q, batch.k_cache, batch.v_cache, tables, starts, lengths, 0.5, None, None, None)
    assert out.is_contiguous()
    assert torch.equal(out, wanted)


def test_a_batch_of_padding_alone_is_zero() -> None:
    batch = make_batch(8, torch.float32)
    starts, lengths = torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    tables = torch.zeros(2, 1, dtype=torch.int32)
    out = paged_attention(batch.q, batch.k_cache, batch.v_cache, tables, starts, lengths, 0.5, None, None, None)
    assert out.shape == batch.q.shape and not out.any()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("seed", range(6))
def test_nothing_beyond_a_context_reaches_a_request(seed: int, window: int | None) -> None:
    """Blocks that were freed by another request may hold NaN, and unused entries of a block table anything."""
    batch = make_batch(seed, torch.float32)
    write_kv_cache(batch.k, batch.v, batch.k_cache, batch.v_cache, batch.slots)
    size = batch.k_cache.shape[1]
    own = {(int(batch.tables[r, p // size]), p % size) for r, n in enumerate(batch.lengths.tolist()) for p in range(n)}
    for cache in (batch.k_cache, batch.v_cache):
        for block in range(len(cache)):
            for place in range(size):
                if (block, place) not in own:
                    cache[block, place] = torch.nan
    for r, length in enumerate(batch.lengths.tolist()):
        batch.tables[r, -(-length // size) :] = 10**6
    out = attend(batch, 0.5, window, None, None)
    assert (out.double() - naive(batch, 0.5, window, None, None)).abs().max() < TOLERANCE[torch.float32]


def test_one_long_context_does_not_make_the_others_longer() -> None:
    """Requests with one new token are computed with those of their own length: memory is at most twice what is read."""
    lengths = [1024] + [8] * 63
    tables = torch.zeros(64, 64, dtype=torch.int32)
    starts, seq_lens = torch.arange(65, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    cache, q = torch.randn(1, 16, 1, 8), torch.randn(64, 1, 8)
    shapes: list[int] = []

    class Sizes(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                shapes.append(out.numel())
            return out

    with Sizes():
        paged_attention(q, cache, cache, tables, starts, seq_lens, 1.0, None, None, None)
    assert max(shapes) <= 2 * sum(-(-n // 16) * 16 for n in lengths) * 8


def test_a_padded_row_writes_nowhere() -> None:
    batch = make_batch(3, torch.float32)
    before = batch.k_cache.clone(), batch.v_cache.clone()
    write_kv_cache(batch.k, batch.v, batch.k_cache, batch.v_cache, torch.full_like(batch.slots, -1))
    assert torch.equal(batch.k_cache, before[0]) and torch.equal(batch.v_cache, before[1])


def test_only_the_slots_that_are_named_change() -> None:
    batch = make_batch(4, torch.float32)
    before = batch.k_cache.clone()
    write_kv_cache(batch.k, batch.v, batch.k_cache, batch.v_cache, batch.slots)
    changed = (batch.k_cache != before).flatten(2).any(-1).flatten().nonzero().flatten()
    assert sorted(changed.tolist()) == sorted(s for s in batch.slots.tolist() if s >= 0)


def test_ops_pass_torchs_own_check() -> None:
    batch = make_batch(5, torch.float32)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.onegraph.write_kv_cache.default,
        (batch.k, batch.v, batch.k_cache, batch.v_cache, batch.slots),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.onegraph.paged_attention.default,
        (batch.q, batch.k_cache, batch.v_cache, batch.tables, batch.starts, batch.lengths, 0.5, 4, None, None),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.onegraph.paged_attention.default,
        (
            *(batch.q, batch.k_cache, batch.v_cache, batch.tables, batch.starts, batch.lengths),
            *(0.5, None, 2.0, torch.zeros(batch.q.shape[1])),
        ),
        test_utils=checks,
    )
