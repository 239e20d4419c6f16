"""The fast path of the input contract: it never lets through what the checks refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.export import Dim

import onegraph.capture.contract as contract_module
from onegraph.capture.contract import input_contract
from onegraph.capture.inputs import read_call
from onegraph.capture.signatures import call_signature
from onegraph.errors import CaptureError, OnegraphError

ROWS = Dim("rows", min=1, max=8)
COLUMNS = Dim("columns", min=0, max=6)


@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


def model(a: Any, b: Any, nested: Any, pair: Any, *, flag: Any = True, scale: Any = 1.0) -> str:
    return "called"


SHAPES = {
    "a": {0: ROWS},
    "b": {0: ROWS, 1: COLUMNS},
    "nested": {"items": [{0: COLUMNS}, {}]},
    "pair": {"left": {0: ROWS}, "right": None},
}


def arguments() -> dict[str, Any]:
    return {
        "a": torch.ones(4, 3),
        "b": torch.ones(4, 5),
        "nested": {"items": [torch.ones(5, dtype=torch.long), torch.ones(2)]},
        "pair": Pair(torch.ones(4), torch.ones(2, 2)),
        "flag": True,
        "scale": 1.0,
    }


def entries() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The entry with its fast path, and one without."""
    with torch.no_grad():
        inputs = read_call(call_signature(model), (), arguments(), SHAPES, 64)
    made = []
    for fast in (contract_module.fast_path, lambda *args: None):
        with mock.patch.object(contract_module, "fast_path", fast):
            contract = input_contract(inputs, {}, lambda size: 16)
            made.append(contract.bind([(None, model)]))
    return made[0], made[1]


FAST, SLOW = entries()


def outcome(entry: Callable[..., Any], given: dict[str, Any]) -> str:
    try:
        return str(entry(**given))
    except (OnegraphError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def aligned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


TENSORS = st.one_of(
    st.builds(aligned, st.integers(0, 9), st.integers(0, 7)),
    st.builds(lambda n: aligned(n), st.integers(0, 9)),
    st.builds(lambda n: aligned(n, 3, dtype=torch.float64), st.integers(0, 9)),
    st.builds(lambda n: aligned(3, n).t(), st.integers(0, 9)),
    st.builds(lambda n: aligned(n, 6)[:, ::2], st.integers(0, 9)),
    st.builds(lambda n: aligned(n * 3 + 1)[1:].view(n, 3), st.integers(0, 9)),
    st.builds(lambda n: aligned(1, 3).expand(n, 3), st.integers(0, 9)),
    st.builds(lambda n: torch._neg_view(aligned(n, 3)), st.integers(1, 9)),
    st.builds(lambda n: torch.zeros(n, 3, dtype=torch.complex64).conj(), st.integers(1, 9)),
    st.builds(lambda n: aligned(n, 3).requires_grad_(), st.integers(1, 9)),
    st.builds(lambda n: torch.nn.Parameter(aligned(n, 3)), st.integers(1, 9)),
    st.builds(lambda n: torch.empty(n, 3, device="meta"), st.integers(0, 9)),
    st.builds(lambda n: aligned(n, 3).to_sparse(), st.integers(1, 9)),
)
VALUES = st.one_of(
    TENSORS, st.sampled_from([None, True, False, 0, 1, 1.0, -0.0, float("nan"), "x", [], {}, (), torch.float32])
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_fast_path_and_the_checks_give_the_same_outcome(data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 9))
    columns = data.draw(st.integers(0, 7))
    passed: dict[str, Any] = {
        "a": aligned(rows, 3),
        "b": aligned(rows, columns),
        "nested": {"items": [aligned(columns, dtype=torch.long), aligned(2)]},
        "pair": Pair(aligned(rows), aligned(2, 2)),
        "flag": True,
        "scale": 1.0,
    }
    for place in data.draw(
        st.lists(st.sampled_from(["a", "b", "item", "pair", "flag", "scale", "nested"]), max_size=2)
    ):
        value = data.draw(VALUES)
        if place == "item":
            passed["nested"] = {"items": [value, aligned(2)]}
        elif place == "pair":
            passed["pair"] = Pair(value, aligned(2, 2))
        else:
            passed[place] = value
    mode = data.draw(st.sampled_from([torch.no_grad, torch.enable_grad, torch.inference_mode]))
    with mode():
        assert outcome(FAST, passed) == outcome(SLOW, passed)


def test_a_call_that_keeps_the_contract_takes_the_fast_path() -> None:
    with mock.patch.object(torch.Tensor, "is_neg", side_effect=AssertionError("the checks ran")):
        assert FAST(**arguments()) == "called"
    with (
        pytest.raises(AssertionError, match="the checks ran"),
        mock.patch.object(torch.Tensor, "is_neg", side_effect=AssertionError("the checks ran")),
    ):
        SLOW(**arguments())


@pytest.mark.parametrize("mode", ["autocast", "no autocast"])
def test_a_size_that_is_new_under_autocast_is_no_way_around_the_check(mode: str) -> None:
    fast, slow = entries()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        assert outcome(fast, arguments()) == outcome(slow, arguments())
        assert ("autocast" in outcome(fast, arguments())) is (mode == "autocast")
    assert outcome(fast, arguments()) == "called"


def test_autocast_is_a_part_of_the_fast_path() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert outcome(FAST, arguments()) == outcome(SLOW, arguments())
        assert "autocast" in outcome(FAST, arguments())


@pytest.mark.parametrize("name", ["_c0", "_n0", "_call0", "_break"])
def test_an_argument_whose_name_the_checks_use_is_refused(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def model({name}): pass", namespace)
    inputs = read_call(call_signature(namespace["model"]), (torch.ones(2),), {}, None, 64)
    with pytest.raises(CaptureError, match=name):
        input_contract(inputs, {}, lambda size: 1)
