"""Torch's attention on CUDA, as it is asked: a stand-in with the interface of torch's computes it by the reference."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen as torchs

from onegraph.env import environment
from onegraph.errors import ConfigError
from onegraph.ops import attention as reference
from onegraph.targets.cuda import varlen
from tests.unit.targets.test_attention_kernel import make_case

REQUESTS = [(1, 40), (3, 20), (0, 5), (20, 3), (1, 7)]


def stand_in(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> None:
    """What torch's documentation says: causal for a right window of 0, aligned at the end of the keys in use."""
    assert seqused_k is not None and block_table is not None and scale is not None and cu_seq_k is not None
    assert cu_seq_q.dtype is cu_seq_k.dtype is seqused_k.dtype is block_table.dtype is torch.int32
    assert max_q >= int(cu_seq_q.diff().max()) and max_k >= int(seqused_k.max()) and window_size[1] == 0
    assert torch.equal(cu_seq_k.diff(), seqused_k) and enable_gqa == (query.shape[1] != key.shape[2])
    window = None if window_size[0] == -1 else window_size[0] + 1
    used = int(cu_seq_q[-1])
    given = (query[:used], key, value, block_table, cu_seq_q, seqused_k, scale, window, None, None)
    out[:used] = reference.paged_attention(*given)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Any:
    if varlen.missing() is not None:
        pytest.skip(f"{varlen.missing()}")
    theirs = inspect.signature(torchs.varlen_attn_out).parameters
    assert inspect.signature(stand_in).parameters.keys() <= theirs.keys()
    monkeypatch.setattr(torchs, "varlen_attn_out", stand_in)

    def own(*args: Any) -> str:
        return "own"

    return varlen.torch_attention(own)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [None, 1, 5, 1000])
def test_it_is_asked_for_what_the_reference_gives(window: int | None, attention: Any) -> None:
    case = make_case(REQUESTS, block=256, sliding_window=window).to(torch.bfloat16)
    expected = reference.paged_attention(*case.arguments())
    found = attention(*case.arguments())
    assert torch.equal(found, expected) and not found[int(case.query_start_loc[-1]) :].any()


def test_what_it_cant_do_is_left_to_our_kernels(attention: Any) -> None:
    for options in ({"logit_softcap": 2.0}, {"sinks": torch.linspace(-2, 2, 6)}, {"size": 20}):
        assert attention(*make_case(REQUESTS, block=256, **options).to(torch.bfloat16).arguments()) == "own"
    assert attention(*make_case(REQUESTS, block=256).to(torch.float32).arguments()) == "own"


def test_blocks_that_it_doesnt_take_are_an_error(attention: Any) -> None:
    with pytest.raises(ConfigError, match="multiple of 256 tokens, and they have 16"):
        attention(*make_case(REQUESTS, block=16).to(torch.bfloat16).arguments())


def test_a_torch_without_block_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchs, "varlen_attn_out", lambda out, query: None, raising=False)
    with pytest.raises(
        ConfigError, match="ONEGRAPH_ATTENTION=torch, but varlen_attn_out of torch .* has no block_table"
    ):
        varlen.torch_attention(lambda: None)  # type: ignore[arg-type]


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment().attention == "own"
    monkeypatch.setenv("ONEGRAPH_ATTENTION", "torch")
    assert environment().attention == "torch"
    monkeypatch.setenv("ONEGRAPH_ATTENTION", "flash")
    with pytest.raises(ConfigError, match="ONEGRAPH_ATTENTION"):
        environment()
