"""Ranges that are covered by several artifacts: by the model's own conditions, or since torch tells 0 and 1 apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaMLP

import onegraph
from onegraph.capture.regions import MAX_REGIONS, first_size, holds, next_sizes
from onegraph.counters import counters
from onegraph.errors import ConfigError, ConstraintError
from onegraph.ir.dims import DynamicDim
from tests.compiled_parts import EAGERS_BITS

N = Dim("n", min=1, max=256)
MODES = ["backed", "unbacked", "backed_size_oblivious"]


def compiled(
    function: Any,
    backend: str = "eager",
    dynamic_shapes: Any = None,
    on_constraint: str = "error",
    dynamic_shapes_mode: str = "unbacked",
) -> Any:
    config = {"backend": backend, "on_constraint": on_constraint, "dynamic_shapes": dynamic_shapes_mode}
    return onegraph.compile(function, dynamic_shapes=dynamic_shapes or {"x": {0: N}}, config=config)


def regions_of(call: Any) -> list[str]:
    return [one["predicate"] for one in call.explain().to_dict()["pieces"][0]["ranges"]]


def branch(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] > 64:
        return x * 2
    return x + 1


def divisible(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] % 8 == 0:
        return x.view(-1, 8, x.shape[1]).sum(1)
    return x.sum(0, keepdim=True)


def nested(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] > 128:
        return x * 2
    if x.shape[0] % 2 == 0:
        return x * 3
    return x * 5


def table(x: torch.Tensor) -> torch.Tensor:
    return x * [2.0, 3.0, 5.0, 7.0][min(x.shape[0] // 64, 3)]


@pytest.mark.parametrize("function", [branch, divisible, nested, table])
@pytest.mark.parametrize("mode", MODES)
def test_a_range_is_split_by_the_model_s_own_conditions(function: Callable[..., torch.Tensor], mode: str) -> None:
    call = compiled(function, on_constraint="split", dynamic_shapes_mode=mode)
    call(torch.randn(3, 4))
    with counters.expect(dynamo_compiles=0):
        for size in range(1, 257):
            x = torch.randn(size, 4)
            torch.testing.assert_close(call(x), function(x), rtol=0, atol=0)
    ledger = call.explain().to_dict()["ledger"]["shape"]
    assert any(entry["effect"] == "split" and entry["user"] and __file__ in entry["user"] for entry in ledger)
    assert 2 <= len(regions_of(call)) <= MAX_REGIONS + 1


@pytest.mark.parametrize("mode", MODES)
def test_without_split_the_condition_is_an_error_in_every_mode(mode: str) -> None:
    with pytest.raises(ConstraintError) as caught:
        compiled(branch, dynamic_shapes_mode=mode)(torch.randn(3, 4))
    assert "n > 64" in str(caught.value) or "n <= 64" in str(caught.value)
    assert f"{__file__}:" in str(caught.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("least", [0, 1, 2])
def test_a_model_without_conditions_is_right_at_every_size_in_every_mode(mode: str, least: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4)).eval()
    call = onegraph.compile(
        module,
        dynamic_shapes={"input": {0: Dim("n", min=least, max=64)}},
        config={"backend": "eager", "passes": EAGERS_BITS, "dynamic_shapes": mode},
    )
    call(torch.randn(5, 4))
    for size in range(least, 65):
        x = torch.randn(size, 4)
        torch.testing.assert_close(call(x), module(x), rtol=0, atol=0)


def test_backed_sizes_give_0_and_1_artifacts_of_their_own() -> None:
    call = compiled(lambda x: x * 2, dynamic_shapes={"x": {0: Dim("n", min=0, max=64)}}, dynamic_shapes_mode="backed")
    call(torch.randn(5, 4))
    ranges = call.explain().to_dict()["pieces"][0]["ranges"]
    assert [(one["min"], one["max"]) for one in ranges] == [(2, 64), (1, 1), (0, 0)]


def test_two_dims_are_split_apart() -> None:
    def compares(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > y.shape[0]:
            return x.sum() * y
        return y + x.sum()

    call = compiled(
        compares,
        dynamic_shapes={"x": {0: Dim("n", min=1, max=24)}, "y": {0: Dim("m", min=1, max=24)}},
        on_constraint="split",
    )
    for n in range(1, 25):
        for m in range(1, 25):
            x, y = torch.randn(n), torch.randn(m)
            torch.testing.assert_close(call(x, y), compares(x, y), rtol=0, atol=0)


def test_the_error_of_a_size_outside_the_range_stays() -> None:
    call = compiled(branch, on_constraint="split")
    call(torch.randn(3, 4))
    with pytest.raises(onegraph.errors.ShapeOutOfRangeError):
        call(torch.randn(257, 4))


def test_more_regions_than_the_limit_are_an_error_with_the_conditions() -> None:
    def many(x: torch.Tensor) -> torch.Tensor:
        for step in range(12):
            if x.shape[0] < 16 * step:
                return x * step
        return x

    with pytest.raises(ConstraintError, match=f"more than {MAX_REGIONS} regions") as caught:
        compiled(many, on_constraint="split")(torch.randn(3, 4))
    assert caught.value.constraints


@pytest.mark.parametrize("mode", MODES)
def test_with_inductor_each_region_is_an_artifact_and_warm_starts_find_them(mode: str, fresh_cache: Path) -> None:
    for store in ("miss", "hit"):
        call = compiled(branch, "inductor", on_constraint="split", dynamic_shapes_mode=mode)
        for size in (1, 2, 64, 65, 256):
            x = torch.randn(size, 4)
            torch.testing.assert_close(call(x), branch(x))
        ranges = call.explain().to_dict()["pieces"][0]["ranges"]
        assert {one["store"] for one in ranges} == {store}
        assert len({one["key"] for one in ranges}) == len(ranges)


class BranchingMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2.0 if x.shape[1] > 16 else 3.0)


def test_a_branch_inside_a_transformers_model_is_split() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaModel(config).eval()
    mlp = BranchingMLP(config)
    mlp.load_state_dict(model.layers[1].mlp.state_dict())
    model.layers[1].mlp = mlp

    def run(ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    call = compiled(run, dynamic_shapes={"ids": {1: Dim("tokens", min=2, max=64)}}, on_constraint="split")
    with torch.no_grad():
        for size in (2, 3, 16, 17, 64):
            ids = torch.arange(size)[None] % 32
            torch.testing.assert_close(call(ids), run(ids))


@settings(max_examples=50, deadline=None)
@given(
    bounds=st.lists(st.integers(2, 255), min_size=1, max_size=4, unique=True),
    least=st.integers(0, 3),
    most=st.integers(4, 256),
)
def test_the_cover_is_whole_and_finds_what_is_left(bounds: list[int], least: int, most: int) -> None:
    """Regions made by thresholds, as a trace at each sample would give them."""
    dims = (DynamicDim("n", least, most),)
    edges = [0, *sorted(bounds), 10**6]
    predicates: list[str] = []
    sizes: Any = (("n", first_size(dims[0], 0)),)
    while sizes is not None:
        ((_, size),) = sizes
        lower, upper = next((a, b) for a, b in itertools.pairwise(edges) if a <= size < b)
        predicates.append(f"(n >= {lower}) and (n < {upper})")
        sizes = next_sizes(dims, predicates)
    checks = [holds(predicate, dims) for predicate in predicates]
    for size in range(least, most + 1):
        assert sum(check((size,)) for check in checks) == 1


def test_many_dims_are_covered_with_those_of_size_1() -> None:
    names = "abcde"
    shapes = {name: {0: Dim(name, min=1, max=500)} for name in names}

    def sums(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return a.sum() + b.sum() * c.sum() - d.sum() + e.sum()

    call = compiled(sums, dynamic_shapes=shapes, dynamic_shapes_mode="backed")
    for sizes in ((1, 1, 1, 1, 1), (500, 1, 7, 1, 3), (2, 3, 4, 5, 6), (500, 500, 500, 500, 500), (9, 9, 1, 9, 9)):
        given = [torch.randn(size) for size in sizes]
        torch.testing.assert_close(call(*given), sums(*given))
    assert len(regions_of(call)) == 2**5


UNUSUAL: dict[str, Callable[[Any], Any]] = {
    "sum of remainders": lambda n: (n % 2) + (n % 3) == 1,
    "bitwise": lambda n: n & 3 == 1,
    "square root": lambda n: math.sqrt(n) > 3,
    "logarithm": lambda n: math.log2(n) > 3,
    "power": lambda n: n**0.5 > 3,
    "ceiling": lambda n: math.ceil(n / 3) == 2,
    "rounding": lambda n: round(n / 3) == 2,
    "truncation": lambda n: int(n / 3) == 2,
    "floor": lambda n: math.floor(n * 0.3) == 2,
    "true division": lambda n: n / 4 == n // 4,
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_a_range_is_split_by_functions_that_python_has_not_under_sympy_s_names(case: str) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if UNUSUAL[case](x.shape[0]) else x * 3

    call = compiled(model, dynamic_shapes={"x": {0: Dim("n", min=1, max=24)}}, on_constraint="split")
    for size in range(1, 25):
        assert torch.equal(call(torch.ones(size, 2)), model(torch.ones(size, 2)))


def test_a_predicate_with_an_unknown_function_is_a_constraint_error() -> None:
    with pytest.raises(ConstraintError, match="there is no function Strange of sizes here"):
        holds("Strange(n) > 3", (DynamicDim("n", 1, 8),))


@pytest.mark.parametrize("name", ["and", "Max"])
def test_a_dim_whose_name_conditions_use_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"a Dim is named '{name}'"):
        compiled(branch, dynamic_shapes={"x": {0: Dim(name, min=1, max=9)}})(torch.ones(3, 2))


def test_samples_are_no_larger_than_they_must_be() -> None:
    """Memory is allocated for them."""
    dims = (DynamicDim("n", 1, 2**31 - 1), DynamicDim("m", 1, 64))
    assert dict(next_sizes(dims, ["n >= 2 and m >= 2"]) or ()) == {"n": 8192, "m": 1}
    assert dict(next_sizes(dims, ["n < 10000"]) or ())["n"] >= 10000


def test_a_size_whose_samples_make_no_progress_is_refused() -> None:
    dims = (DynamicDim("n", 1, 10),)
    assert next_sizes(dims, ["n >= 1"]) is None
    assert next_sizes(dims, ["n > 5"]) == (("n", 5),)
