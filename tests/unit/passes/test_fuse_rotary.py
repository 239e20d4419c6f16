"""fuse_rotary: which spellings become `onegraph::rotary`, and what has to stay; move_rotary after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from onegraph.ir.passes import Border
from onegraph.ir.piece import Piece
from onegraph.passes.fuse_rotary import FuseRotary
from onegraph.passes.move_rotary import MoveRotary
from onegraph.passes.remove_dead_code import RemoveDeadCode
from tests.unit.passes.one_piece import calls, piece_of, rewritten

T, H, K, D = 5, 4, 2, 16


def halves(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def model(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    """As transformers' Llama and its attention interface have it: batch, heads, tokens, head size."""
    q, k, v = (qkv[None] * 2).split((H * D, K * D, K * D), -1)
    q, k = (one.view(1, -1, heads, D).transpose(1, 2) for one, heads in ((q, H), (k, K)))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q = (q * cos) + (halves(q) * sin)
    k = (k * cos) + (halves(k) * sin)
    return q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].view(-1, K, D)


def given(
    dtype: torch.dtype = torch.bfloat16, size: int = D, *, by: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(T, (H + 2 * K) * D, generator=generator).to(dtype)
    cos, sin = (torch.randn(1, T, size, generator=generator).to(by or dtype) for _ in range(2))
    return qkv, cos, sin


def fused(function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[Piece, Any]:
    after, (run,) = rewritten(piece_of(function, *inputs, unbacked=False), FuseRotary())
    return after, run


def results(piece: Piece, **inputs: torch.Tensor) -> Any:
    return piece.graph_module(*(inputs[name.removeprefix("l_").removesuffix("_")] for name in piece.inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_llamas_rotary_is_one_call_on_views(dtype: torch.dtype) -> None:
    piece = piece_of(model, *given(dtype), unbacked=False)
    after, (run, _) = rewritten(piece, FuseRotary(), RemoveDeadCode())
    assert run.rewrites == 1
    told = calls(after)
    assert [call.partition(" = ")[2].partition("(")[0] for call in told[:-1]] == [
        "getitem", "mul", "split", "getitem", "getitem", "getitem", "view", "transpose", "view", "transpose",
        "select", "transpose", "select", "transpose", "onegraph::rotary", "getitem", "getitem", "getitem", "view",
    ]  # fmt: skip
    assert next(call for call in told if "onegraph::rotary" in call).endswith(", l_cos_, l_sin_)")
    inputs = dict(zip(("qkv", "cos", "sin"), given(dtype), strict=True))
    for found, wanted in zip(results(after, **inputs), results(piece, **inputs), strict=True):
        assert torch.equal(found, wanted)


def test_a_symbolic_number_of_tokens() -> None:
    after, (run,) = rewritten(piece_of(flat, *given_flat()), FuseRotary())
    assert run.rewrites == 1
    assert any("onegraph::rotary(" in call for call in calls(after))


def flat(q: torch.Tensor, k: torch.Tensor, emb: torch.Tensor) -> Any:
    """Tokens first, both operand orders, cos and sin made in place."""
    cos, sin = emb.cos()[:, None], emb.sin()[:, None]
    return sin * halves(q) + cos * q, k * cos + halves(k) * sin


def given_flat() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, H, D), (T, K, D), (T, D))
    inputs = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    for one in inputs:
        torch._dynamo.decorators.mark_unbacked(one, 0, shape_id="T")
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_part_of_a_head_that_turns(dtype: torch.dtype) -> None:
    """As Phi-3 has it."""

    def function(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        size = cos.shape[-1]
        turned = []
        for x in (q, k):
            turning, rest = x[..., :size], x[..., size:]
            turned.append(torch.cat([(turning * cos) + (halves(turning) * sin), rest], dim=-1))
        return tuple(turned)

    _, cos, sin = given(dtype, 6)
    q, k = torch.randn(1, H, T, D).to(dtype), torch.randn(1, K, T, D).to(dtype)
    piece = piece_of(function, q, k, cos, sin, unbacked=False)
    after, (run,) = rewritten(piece, FuseRotary())
    assert run.rewrites == 1
    assert not any("cat" in call for call in calls(after))
    inputs = {"q": q, "k": k, "cos": cos, "sin": sin}
    for found, wanted in zip(results(after, **inputs), results(piece, **inputs), strict=True):
        assert torch.equal(found, wanted)


def with_other(turned: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def function(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        q, k = (one.view(1, T, -1, D).transpose(1, 2) for one in qkv[None].split((H * D, 2 * K * D), -1))
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return turned(q, cos, sin), turned(k, cos, sin)

    return function


def minus_first(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x[..., D // 2 :], -x[..., : D // 2]), -1)


def uneven(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((-x[..., D // 4 :], x[..., : D // 4]), -1)


STAY: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], str | None]] = {
    "pairs side by side": (
        with_other(lambda x, cos, sin: x * cos + pairs(x) * sin),
        given(),
        "the elements of a pair lie side by side",
    ),
    "the other direction": (with_other(lambda x, cos, sin: x * cos + minus_first(x) * sin), given(), None),
    "a difference": (with_other(lambda x, cos, sin: x * cos - halves(x) * sin), given(), None),
    "other parts": (with_other(lambda x, cos, sin: x * cos + uneven(x) * sin), given(), None),
    "halves of something else": (with_other(lambda x, cos, sin: x * cos + halves(x + 1) * sin), given(), None),
    "a multiple of the sum": (
        with_other(lambda x, cos, sin: torch.add(x * cos, halves(x) * sin, alpha=2)),
        given(),
        None,
    ),
    "cos of a wider dtype": (
        with_other(lambda x, cos, sin: x * cos + halves(x) * sin),
        given(by=torch.float32),
        "queries, cos and sin aren't all of one dtype, float32 or bfloat16",
    ),
    "fp16": (
        with_other(lambda x, cos, sin: x * cos + halves(x) * sin),
        given(torch.float16),
        "queries, cos and sin aren't all of one dtype, float32 or bfloat16",
    ),
    "queries alone": (
        lambda qkv, cos, sin: (x := qkv.view(1, T, -1, D).transpose(1, 2)) * cos[:, None] + halves(x) * sin[:, None],
        given(),
        "there are no keys beside it that turn alike",
    ),
}


@pytest.mark.parametrize(("function", "inputs", "why"), STAY.values(), ids=STAY)
def test_what_only_looks_like_it_stays(
    function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], why: str | None
) -> None:
    after, run = fused(function, *inputs)
    assert run.rewrites == 0
    assert not any("onegraph::" in call for call in calls(after))
    assert [miss.why for miss in run.near_misses][:1] == ([why] if why else [])


def test_a_batch_of_two_stays() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return q * cos + halves(q) * sin, k * cos + halves(k) * sin

    q, k, cos, sin = torch.randn(2, H, T, D), torch.randn(2, K, T, D), torch.randn(2, 1, T, D), torch.randn(2, 1, T, D)
    _, run = fused(function, q, k, cos, sin)
    assert run.rewrites == 0
    assert [miss.why for miss in run.near_misses] == ["the dims of tokens and heads can't be told from cos"]


def test_a_change_in_place_in_between_stays() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        turned = q * cos + halves(q) * sin
        k.mul_(2)
        return turned, k * cos + halves(k) * sin

    q, k, cos, sin = torch.randn(T, H, D), torch.randn(T, K, D), torch.randn(T, 1, D), torch.randn(T, 1, D)
    _, run = fused(function, q, k, cos, sin)
    assert run.rewrites == 0
    assert [miss.why for miss in run.near_misses] == ["something is changed in place between the queries and the keys"]


def test_fuel_is_respected() -> None:
    _, (run,) = rewritten(piece_of(model, *given(), unbacked=False), FuseRotary(), fuel=0)
    assert run.rewrites == 0


def write(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor, q: torch.Tensor
) -> torch.Tensor:
    torch.ops.onegraph.write_kv_cache(k, v, k_cache, v_cache, slots)
    ones = torch.ops.onegraph.grouped_linear(q.view(T, -1), torch.ones(1, 3, H * D), torch.zeros(T, dtype=torch.int64))
    return ones.sin()


def neighbours(after: Callable[..., Any] = write) -> tuple[Piece, Piece, list[torch.Tensor]]:
    """A piece that ends with rotary, and one that writes its keys; with the second one's inputs after `q, k, v`."""
    inputs = given(torch.float32)
    before = replace(
        rewritten(piece_of(model, *inputs, unbacked=False), FuseRotary(), RemoveDeadCode())[0], outputs=("q", "k", "v")
    )
    q, k, v = before.graph_module(*inputs)
    caches = [torch.zeros(4, 3, K, D), torch.zeros(4, 3, K, D)]
    slots = torch.tensor([7, -1, 2, 11, 0])
    second = piece_of(after, k, v, *caches, slots, q, unbacked=False)
    names = {"l_k_": "k", "l_v_": "v", "l_q_": "q"}
    second = replace(second, kind="splitting_op", inputs=tuple(names.get(one.lower(), one) for one in second.inputs))
    return before, second, [*caches, slots]


def run_both(before: Piece, after: Piece, rest: list[torch.Tensor]) -> Any:
    values = dict(zip(("l_qkv_", "l_cos_", "l_sin_"), given(torch.float32), strict=True))
    values.update(zip(before.outputs, before.graph_module(*(values[one] for one in before.inputs)), strict=True))
    caches = [one.clone() for one in rest]
    values.update(zip((one for one in after.inputs if one not in values), caches, strict=True))
    return [*after.graph_module(*(values[one] for one in after.inputs)), *caches]


def test_rotary_moves_into_the_write_of_the_cache() -> None:
    before, after, rest = neighbours()
    made = MoveRotary().rewrite(Border(before, after, frozenset({"q", "k", "v"})))
    assert isinstance(made, tuple)
    first, second = made
    assert not any("rotary" in call for call in calls(first))
    assert first.outputs == ("q_unturned", "k_unturned", "v")
    assert calls(second)[0].startswith("rotary_write_kv_cache_default = onegraph::rotary_write_kv_cache(")
    assert not any("= onegraph::write_kv_cache" in call for call in calls(second))
    for found, wanted in zip(run_both(first, second, rest), run_both(before, after, rest), strict=True):
        assert torch.equal(found, wanted)
    assert any("rotary" in call for call in calls(before)), "the pieces that it was given have changed"


def reads_first(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor, q: torch.Tensor
) -> torch.Tensor:
    early = q.sin()
    torch.ops.onegraph.write_kv_cache(k, v, k_cache, v_cache, slots)
    return early


def uses_keys(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor, q: torch.Tensor
) -> torch.Tensor:
    torch.ops.onegraph.write_kv_cache(k, v, k_cache, v_cache, slots)
    return k.sum() + q.sum()


@pytest.mark.parametrize(
    ("after", "private", "why"),
    [
        (write, {"q", "v"}, "others than the splitting ops read the turned queries or keys"),
        (reads_first, {"q", "k", "v"}, "the queries are read before the keys are written, or returned"),
        (uses_keys, {"q", "k", "v"}, "the keys go elsewhere than into the KV cache"),
    ],
    ids=["read elsewhere", "read first", "other uses of the keys"],
)
def test_rotary_stays_where_moving_it_would_tell(after: Callable[..., Any], private: set[str], why: str) -> None:
    before, second, _ = neighbours(after)
    assert MoveRotary().rewrite(Border(before, second, frozenset(private))) == why
