"""The C++ attention kernel against the reference in fp64: shapes, options, layouts, threads, what it mustn't see."""

from __future__ import annotations

import platform
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch

from onegraph.ops import attention, kv_cache
from onegraph.torch_compat import cpu_facts

pytestmark = pytest.mark.usefixtures("op_kernels")

KernelsBuiltWith = Callable[..., Mapping[str, Callable[..., torch.Tensor]]]

FP32_TOLERANCE = 1e-5
BF16_FACTOR = 1.5
"""Both round a result once, from fp32; matrix instructions round weights too, as SDPA does."""

NEW_AND_OLD = ((1, 0), (1, 30), (1, 300), (1, 2500), (2, 0), (3, 130), (0, 5), (7, 3), (70, 0), (130, 300), (150, 40))


@dataclass
class Case:
    """The op's arguments. All that no request owns in the caches is NaN, and table entries out of use are wild."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    scale: float
    sliding_window: int | None = None
    logit_softcap: float | None = None
    sinks: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        changed = {name: getattr(self, name) for name in ("q", "k_cache", "v_cache", "sinks")}
        return replace(self, **{name: None if t is None else t.to(dtype) for name, t in changed.items()})

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def make_case(
    requests: list[tuple[int, int]],
    *,
    seed: int = 0,
    shared: int = 2,
    group: int = 3,
    size: int = 64,
    block: int = 16,
    padding: int = 2,
    **options: Any,
) -> Case:
    """Requests of (new, old) tokens whose blocks are shuffled; queries are every other half of wider rows."""
    generator, shuffled = torch.Generator().manual_seed(seed), random.Random(seed)
    blocks = [-(-(new + old) // block) for new, old in requests]
    order = list(range(sum(blocks) + 3))
    shuffled.shuffle(order)
    caches = [torch.full((len(order) * block, shared, size), torch.nan) for _ in range(2)]
    tables = torch.full((len(requests), max(blocks) + 1), 10**6, dtype=torch.int32)
    for r, (new, old) in enumerate(requests):
        own = torch.tensor([order.pop() for _ in range(blocks[r])])
        tables[r, : blocks[r]] = own
        slots = (own[:, None] * block + torch.arange(block)).flatten()[: new + old]
        for cache in caches:
            cache[slots] = torch.randn(new + old, shared, size, generator=generator)
    starts = torch.tensor([0, *(new for new, _ in requests)]).cumsum(0).int()
    q = torch.randn(int(starts[-1]) + padding, shared * group, 2 * size, generator=generator)[..., :size]
    k_cache, v_cache = (cache.view(-1, block, shared, size) for cache in caches)
    lengths = torch.tensor([new + old for new, old in requests], dtype=torch.int32)
    return Case(q, k_cache, v_cache, tables, starts, lengths, size**-0.5, **options)


def run(case: Case) -> torch.Tensor:
    out: torch.Tensor = torch.ops.onegraph.paged_attention(*case.arguments())
    assert out.is_contiguous() and out.dtype == case.q.dtype
    return out


def exact(case: Case) -> torch.Tensor:
    return attention.paged_attention(*case.to(torch.float64).arguments())


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(seed: int) -> Case:
    rng = random.Random(seed)
    shared, group = rng.choice([1, 2, 3]), rng.choice([1, 3, 4, 8, 20])
    window, softcap = rng.choice([None, None, 1, 5, 64, 200]), rng.choice([None, None, 2.0, 30.0])
    sinks = rng.choice([None, torch.linspace(-3, 3, shared * group)])
    return make_case(
        [rng.choice(NEW_AND_OLD) for _ in range(rng.randint(1, 5))], seed=seed, shared=shared, group=group,
        size=rng.choice([4, 16, 20, 32, 64, 72, 80, 96, 128, 256]), block=rng.choice([1, 4, 16, 32]),
        sliding_window=window, logit_softcap=softcap, sinks=sinks,
    )  # fmt: skip


def test_the_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests here would compare the reference with itself."""

    def fail(*arguments: Any) -> None:
        raise AssertionError("the reference was called")

    case = drawn(0)
    monkeypatch.setattr(attention, "paged_attention", fail)
    monkeypatch.setattr(kv_cache, "write_kv_cache", fail)
    for dtype in (torch.float32, torch.bfloat16):
        one = case.to(dtype)
        run(one)
        new = torch.ones(1, *one.k_cache.shape[2:], dtype=dtype)
        torch.ops.onegraph.write_kv_cache(new, new, one.k_cache, one.v_cache, torch.tensor([0]))


@pytest.mark.parametrize("seed", range(30))
def test_fp32_equals_the_reference_in_fp64(seed: int, threads: int) -> None:
    case = drawn(seed)
    out = run(case)
    assert (out - exact(case)).abs().max() < FP32_TOLERANCE
    assert not out[int(case.query_start_loc[-1]) :].any(), "padded rows are zero"


@pytest.mark.parametrize("seed", range(30, 45))
def test_bf16_is_as_near_to_fp64_as_the_reference(seed: int) -> None:
    case = drawn(seed).to(torch.bfloat16)
    wanted = exact(case)
    reference = (attention.paged_attention(*case.arguments()) - wanted).abs().max()
    assert (run(case) - wanted).abs().max() <= BF16_FACTOR * reference


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
def test_vectors_of_four_floats_do_too(kernels_built_with: KernelsBuiltWith) -> None:
    """What other CPUs run; a tail of fewer than eight keys once wrote far beyond the scores."""
    attend = kernels_built_with("-march=x86-64", "-mno-avx", "-mno-fma")["paged_attention"]
    for seed in range(10):
        case = drawn(seed)
        assert (attend(*case.arguments()) - exact(case)).abs().max() < FP32_TOLERANCE


@pytest.mark.skipif("amx_bf16" not in cpu_facts.cpu_flags(), reason="this CPU has no matrix instructions to leave out")
def test_bf16_without_matrix_instructions_does_too(kernels_built_with: KernelsBuiltWith) -> None:
    """What runs on a CPU without AMX, and where the system doesn't let a process use it."""
    attend = kernels_built_with("-mno-amx-bf16")["paged_attention"]
    for seed in range(30, 40):
        case = drawn(seed).to(torch.bfloat16)
        wanted = exact(case)
        reference = (attention.paged_attention(*case.arguments()) - wanted).abs().max()
        assert (attend(*case.arguments()) - wanted).abs().max() <= BF16_FACTOR * reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_result_does_not_depend_on_batch_mates_or_threads(dtype: torch.dtype, threads: int) -> None:
    requests = [(1, 300), (1, 2500), (40, 90), (1, 30), (200, 0)]
    case = make_case(requests, sliding_window=700, sinks=torch.linspace(-1, 1, 6)).to(dtype)
    together, starts = run(case), case.query_start_loc
    for r in range(len(requests)):
        rows = slice(int(starts[r]), int(starts[r + 1]))
        alone = replace(
            case,
            q=case.q[rows],
            block_tables=case.block_tables[r : r + 1],
            query_start_loc=starts[r : r + 2] - starts[r],
            seq_lens=case.seq_lens[r : r + 1],
        )
        assert torch.equal(run(alone), together[rows])


def test_nan_in_a_query_stays_in_its_row() -> None:
    for requests in ([(1, 40), (1, 300)], [(20, 0), (3, 10)]):
        case = make_case(requests, padding=0)
        case.q[1, 0] = torch.nan
        bad = run(case).isnan().any(-1)
        assert bad.nonzero().tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block_tables", torch.full((1, 9), 10**6, dtype=torch.int32), "block_tables names a block"),
        ("block_tables", torch.full((1, 9), -1, dtype=torch.int32), "block_tables names a block"),
        ("seq_lens", torch.tensor([10**6], dtype=torch.int32), "longer than its row"),
        ("seq_lens", torch.tensor([2], dtype=torch.int32), "shorter than its new tokens"),
        ("query_start_loc", torch.tensor([0, 10**6], dtype=torch.int32), "isn't within the queries"),
        ("sliding_window", 0, "sliding_window is less than 1"),
    ],
)
def test_what_would_read_elsewhere_is_refused(name: str, value: Any, message: str) -> None:
    case = replace(make_case([(3, 60)]), **{name: value})
    with pytest.raises(RuntimeError, match=message):
        run(case)


def test_other_dtypes_are_the_references() -> None:
    case = make_case([(1, 20), (5, 0)])
    for dtype in (torch.float64, torch.float16):
        assert torch.equal(run(case.to(dtype)), attention.paged_attention(*case.to(dtype).arguments()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_write_equals_the_reference(dtype: torch.dtype, threads: int) -> None:
    """Keys as a model leaves them, with heads before tokens; some rows are padding."""
    k, v = (torch.randn(3, 9, 20, dtype=torch.float64).to(dtype).transpose(0, 1) for _ in range(2))
    caches = [torch.zeros(7, 4, 3, 20, dtype=dtype) for _ in range(4)]
    slots = torch.tensor([5, -1, 27, 0, 1, 2, -1, 14, 8])
    torch.ops.onegraph.write_kv_cache(k, v, caches[0], caches[1], slots)
    kv_cache.write_kv_cache(k, v, caches[2], caches[3], slots)
    assert caches[0].any() and torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


def test_a_write_beyond_the_cache_is_refused() -> None:
    cache, new = torch.zeros(2, 4, 1, 8), torch.ones(1, 1, 8)
    with pytest.raises(RuntimeError, match="slot_mapping names a slot"):
        torch.ops.onegraph.write_kv_cache(new, new, cache, cache.clone(), torch.tensor([8]))
    assert not cache.any()
