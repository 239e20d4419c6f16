"""The Triton kernels of attention and the cache write against the reference in fp64.

On a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter on the CPU, which is slow: a few small cases.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

from onegraph.ops import attention as reference
from onegraph.ops import kv_cache
from tests.unit.targets.test_attention_kernel import Case, make_case

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton isn't installed: it comes with torch for CUDA", allow_module_level=True)
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is no GPU, and TRITON_INTERPRET=1 isn't set", allow_module_level=True)

from onegraph.targets.cuda import attention  # noqa: E402 - imports triton

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
"""The interpreter takes the bits of bfloat16 for whole numbers (Triton 3.6)."""
MIXED = [(1, 0), (1, 40), (3, 20), (0, 5), (20, 3), (70, 0), (1, 7)]
DECODE = [(1, 30), (1, 0), (1, 300), (1, 15), (1, 16)]


def on_device(case: Case) -> tuple[Any, ...]:
    return tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case.arguments())


def check(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """The kernel's result of the case in this dtype is near that of the reference in fp64."""
    case = case.to(dtype)
    expected = reference.paged_attention(*case.to(torch.float64).arguments())
    out = attention.paged_attention(*on_device(case))
    assert out.dtype is dtype and out.is_contiguous() and out.shape == expected.shape
    assert (out.double().cpu() - expected).abs().max() < TOLERANCE[dtype]
    assert not out[int(case.query_start_loc[-1]) :].any(), "padded rows are zero"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requests", [MIXED, DECODE], ids=["mixed", "decode"])
def test_equals_the_reference(requests: list[tuple[int, int]], dtype: torch.dtype) -> None:
    check(make_case(requests), dtype)


@pytest.mark.parametrize("size", [16, 80, 128, 256] if HAS_GPU else [16, 80])
@pytest.mark.parametrize(("shared", "group"), [(1, 1), (2, 4), (1, 7), (3, 1)])
def test_shapes(size: int, shared: int, group: int) -> None:
    for requests in ([(1, 40), (5, 20)], [(1, 40), (1, 3)]):
        check(make_case(requests, size=size, shared=shared, group=group))


@pytest.mark.parametrize("block", [1, 4, 16, 128])
def test_block_sizes(block: int) -> None:
    check(make_case([(1, 130), (9, 20), (1, 0)], block=block))


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 5, 64, 1000])
def test_options(window: int | None, softcap: float | None, with_sinks: bool) -> None:
    sinks = torch.linspace(-2, 2, 6) if with_sinks else None
    for requests in ([(1, 600), (30, 50), (1, 2)], [(1, 600), (1, 0)]):
        check(
            make_case(requests, sliding_window=window, logit_softcap=softcap, sinks=sinks),
        )


@pytest.mark.parametrize("length", [255, 256, 513, 2600] if HAS_GPU else [255, 513])
def test_a_long_context_is_split(length: int) -> None:
    check(make_case([(1, length)]))
    check(make_case([(1, length), (1, 0), (1, 3)]))


def test_two_tokens_of_one_request_beside_an_empty_one() -> None:
    """As many tokens as requests, and yet not one each."""
    check(make_case([(2, 30), (0, 5), (1, 9)], padding=0))


def test_random_shapes() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*values: int) -> int:
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    for seed in range(20 if HAS_GPU else 3):
        requests = [(draw(0, 1, 1, 1, 2, 7, 33), draw(1, 15, 16, 17, 70, 300)) for _ in range(draw(1, 2, 3, 8))]
        requests.append((1, draw(0, 5)))
        case = make_case(
            requests,
            seed=seed,
            shared=draw(1, 2, 4),
            group=draw(1, 2, 3, 8),
            size=draw(16, 64, 96) if HAS_GPU else draw(16, 32),
            block=draw(8, 16, 32),
            padding=draw(0, 3),
            sliding_window=[None, 7, 40][seed % 3],
            logit_softcap=[None, 5.0][seed % 2],
        )
        check(case, DTYPES[seed % len(DTYPES)])


def test_what_the_kernels_leave_to_the_reference() -> None:
    case = make_case([(1, 3), (4, 2)]).to(torch.float64)
    expected = reference.paged_attention(*case.arguments())
    torch.testing.assert_close(attention.paged_attention(*on_device(case)).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shared", "size"), [(2, 64), (3, 80), (1, 16), (16, 128)])
def test_the_cache_write(shared: int, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(5, shared, 2 * size, generator=generator)[..., :size].to(dtype) for _ in range(2))
    slots = torch.tensor([7, -1, 0, 31, 12])
    expected = [torch.ones(4, 8, shared, size, dtype=dtype) for _ in range(2)]
    caches = [cache.clone().to(DEVICE) for cache in expected]
    kv_cache.write_kv_cache(k, v, *expected, slots)
    attention.write_kv_cache(k.to(DEVICE), v.to(DEVICE), *caches, slots.to(DEVICE))
    for cache, wanted in zip(caches, expected, strict=True):
        assert torch.equal(cache.cpu(), wanted)
