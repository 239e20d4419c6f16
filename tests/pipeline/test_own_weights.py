"""Merged weights in calls: each way of changing a weight is seen, and nobody's weights but an owner's are touched."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.binding import BoundWeights, bind_groups, bind_weights, group_indices
from onegraph.counters import counters
from onegraph.errors import ConfigError, InputContractError
from onegraph.ir.graph import WeightInput
from onegraph.ir.weights import MergedWeight
from onegraph.weights import WeightStore

NAMES = ("q", "k", "v")


class Attention(nn.Module):
    """Three projections of one input; `head` is tied to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 16, bias=False)
        self.k = nn.Linear(8, 4, bias=False)
        self.v = nn.Linear(8, 4, bias=False)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.q.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x), self.head(x)], -1)


def module() -> Attention:
    torch.manual_seed(0)
    return Attention().eval()


def bound(
    m: Attention,
    store: WeightStore | None = None,
    mutates_inputs: bool = False,
    told: Callable[[int], None] | None = None,
) -> BoundWeights:
    """The module with its three weights merged, as a pass would have it."""
    graph = torch.fx.Graph()
    for index in range(len(NAMES)):
        graph.placeholder(f"weight_{index}")
    graph.placeholder("x")
    fakes = [getattr(m, name).weight.detach() for name in NAMES]
    captured: Any = types.SimpleNamespace(
        graph_module=types.SimpleNamespace(graph=graph),
        weights=tuple(WeightInput(f"{name}.weight", getattr(m, name)._parameters, "weight") for name in NAMES),
        fake_inputs=(*fakes, torch.ones(3, 8)),
        input_names=("L['x']",),
    )

    def call(q: Any, k: Any, v: Any, merged: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = x @ merged.t()
        return torch.cat([out, out[:, :16]], -1)

    merged = [MergedWeight("merged", ("weight_0", "weight_1", "weight_2"))]
    groups = bind_groups(store or WeightStore(m), captured.weights, group_indices(captured, merged), int)
    tensors = [0] if mutates_inputs else []
    return bind_weights(call, captured.weights, captured.input_names, tensors, groups, told=told)


def in_place(m: Attention) -> None:
    with torch.no_grad():
        m.k.weight.mul_(2.0)
        m.q.weight[3].zero_()


def set_weight(name: str, value: Callable[[Attention], Any]) -> Callable[[Attention], None]:
    return lambda m: setattr(getattr(m, name), "weight", value(m))


CHANGES: dict[str, Callable[[Attention], Any]] = {
    "in place": in_place,
    "copied": lambda m: m.q.weight.data.copy_(torch.ones(16, 8)),
    "loaded": lambda m: m.load_state_dict({n: v + 1 for n, v in m.state_dict().items()}),
    "loaded by assignment": lambda m: m.load_state_dict({n: v + 1 for n, v in m.state_dict().items()}, assign=True),
    "a new Parameter": set_weight("k", lambda m: nn.Parameter(torch.ones(4, 8))),
    "data": lambda m: setattr(m.v.weight, "data", torch.ones(4, 8)),
    "data made in inference mode": lambda m: setattr(m.v.weight, "data", torch.inference_mode()(torch.ones)(4, 8)),
    "data that is a view of another": lambda m: setattr(m.k.weight, "data", m.q.weight.data[:4]),
    "data that lies where another lay": lambda m: setattr(m.k.weight, "data", m.v.weight.data),
    "a Parameter over the memory of another": set_weight("k", lambda m: nn.Parameter(m.q.weight.data[4:8])),
    "the same Parameter": set_weight("k", lambda m: m.v.weight),
    "an untied one": set_weight("q", lambda m: nn.Parameter(torch.ones(16, 8))) ,
    "a slice of a flat buffer": lambda m: [
        setattr(linear.weight, "data", part)
        for linear, part in zip((m.q, m.k, m.v), torch.rand(24, 8).split([16, 4, 4]), strict=True)
    ],
    "another dtype and back": lambda m: m.half().float(),
    "grad mode": lambda m: m.requires_grad_(False),
    "apply": lambda m: m._apply(lambda tensor: tensor * 2),
    "another process": lambda m: m.share_memory(),
    "swapped tensors": lambda m: torch.utils.swap_tensors(m.k.weight, nn.Parameter(torch.ones(4, 8))),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_seen(name: str) -> None:
    m, x = module(), torch.rand(3, 8)
    run = bound(m)
    for _ in range(2):
        CHANGES[name](m)
        for _ in range(2):  # twice: what is merged again, and what is found merged
            torch.testing.assert_close(run.run(x)[:, :24], m(x)[:, :24])
            in_place(m)
            torch.testing.assert_close(run.run(x)[:, :24], m(x)[:, :24])
    assert run.fit() and run.changes() == ()


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_before_the_weights_are_merged(name: str) -> None:
    m, x = module(), torch.rand(3, 8)
    CHANGES[name](m)
    run = bound(m)
    torch.testing.assert_close(run.run(x)[:, :24], m(x)[:, :24])
    in_place(m)
    torch.testing.assert_close(run.run(x)[:, :24], m(x)[:, :24])


@pytest.mark.parametrize("name", ["dtype", "shape", "deleted"])
def test_what_is_of_another_kind_is_told_as_without_merging(name: str) -> None:
    m, x = module(), torch.rand(3, 8)
    run = bound(m)
    run.run(x)
    changes: dict[str, Callable[[], Any]] = {
        "dtype": m.half,
        "shape": lambda: setattr(m.k, "weight", nn.Parameter(torch.ones(5, 8))),
        "deleted": lambda: delattr(m.k, "weight"),
    }
    changes[name]()
    assert not run.fit()
    with pytest.raises(InputContractError, match="weight was replaced"):
        run.run(x)


def test_a_replaced_weight_whose_memory_another_gets() -> None:
    """Old blocks are freed and their addresses given out again; what lies there then isn't taken for what lay there."""
    m, x = module(), torch.rand(3, 8)
    store = WeightStore(m)
    first, second = bound(m, store), bound(m, store)
    for step in range(50):
        for linear in (m.q, m.k, m.v):
            linear.weight.data = torch.full_like(linear.weight, float(step))
        if step % 3:
            torch.testing.assert_close(first.run(x)[:, :24], m(x)[:, :24])
        if step % 2:
            torch.testing.assert_close(second.run(x)[:, :24], m(x)[:, :24])


def test_an_input_that_lies_in_a_merged_weight_is_refused() -> None:
    m, x = module(), torch.rand(3, 8)
    run = bound(m, mutates_inputs=True)
    run.run(x)
    for _ in range(2):
        with pytest.raises(InputContractError, match=r"x and k\.weight share memory"):
            run.run(m.k.weight.data[:3])
        m.k.weight = nn.Parameter(torch.ones(4, 8))  # lies elsewhere from the next call on
        run.run(x)


def test_threads_that_call_after_a_change() -> None:
    m, x = module(), torch.rand(3, 8)
    run = bound(m)
    for step in range(20):
        m.k.weight.data = torch.full((4, 8), float(step))
        want, got = m(x)[:, :24], []
        threads = [threading.Thread(target=lambda got=got: got.append(run.run(x))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 4
        for one in got:
            torch.testing.assert_close(one[:, :24], want)


def test_no_gradient_and_inference_mode() -> None:
    m, x = module(), torch.rand(3, 8)
    run = bound(m)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            m.k.weight.data = torch.rand(4, 8).clone()
            got = run.run(x)
            torch.testing.assert_close(got[:, :24], m(x)[:, :24])
            assert not got.requires_grad


def test_a_caller_s_module_stays_as_it_is() -> None:
    m, x = module(), torch.rand(3, 8)
    before = [(p.data_ptr(), p.untyped_storage()._cdata) for p in m.parameters()]
    with counters.expect(weights_merged=0):
        torch.testing.assert_close(onegraph.compile(m)(x), m(x))
    assert before == [(p.data_ptr(), p.untyped_storage()._cdata) for p in m.parameters()]


def test_only_a_module_s_weights_can_be_owned() -> None:
    with pytest.raises(ConfigError, match="no module"):
        onegraph.compile(torch.relu, own_weights=True)
    assert onegraph.compile(module().forward, config=CONFIG, own_weights=True)(torch.ones(3, 8)).shape == (3, 40)


CONFIG: dict[str, Any] = {"backend": "eager", "passes": {"merge_linears": {"if_present": True}}}
ROWS = {"x": {0: Dim("rows", min=1, max=64)}}


def is_merged(m: Attention) -> bool:
    parts = [m.q.weight, m.k.weight, m.v.weight]
    return [p.data_ptr() + p.nbytes for p in parts[:2]] == [p.data_ptr() for p in parts[1:]]


def untied() -> Attention:
    """Whose `head` reads another input, so that three layers are merged."""
    m = module()
    m.head = nn.Linear(24, 8, bias=False)
    m.forward = types.MethodType(lambda self, x: self.head(torch.cat([self.q(x), self.k(x), self.v(x)], -1)), m)
    return m


def owned(m: Attention, **config: Any) -> onegraph.compiled.CompiledModel:
    return onegraph.compile(m, dynamic_shapes=ROWS, config={**CONFIG, **config}, own_weights=True)


AFTER_CAPTURE = [name for name in CHANGES if name != "swapped tensors"]  # torch refuses: Dynamo has weak references


@pytest.mark.parametrize("freeze", [False, True], ids=["checked", "frozen"])
@pytest.mark.parametrize("name", AFTER_CAPTURE)
def test_each_change_is_seen_by_a_compiled_module(name: str, freeze: bool) -> None:
    m, x = untied(), torch.rand(3, 8)
    compiled = owned(m, freeze=freeze)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), m(x))
        assert is_merged(m)
        for _ in range(2):
            CHANGES[name](m)
            for rows in (3, 2):
                torch.testing.assert_close(compiled(x[:rows]), m(x[:rows]))
                in_place(m)
                torch.testing.assert_close(compiled(x[:rows]), m(x[:rows]))


@pytest.mark.parametrize("name", AFTER_CAPTURE)
def test_each_change_before_the_first_call(name: str) -> None:
    m, x = untied(), torch.rand(3, 8)
    compiled = owned(m)
    CHANGES[name](m)
    with torch.no_grad():
        for change in (lambda m: None, in_place, CHANGES[name]):
            change(m)
            torch.testing.assert_close(compiled(x), m(x))


def test_another_dtype_is_captured_once_more_and_merged_there_too() -> None:
    m, x = untied(), torch.rand(3, 8)
    compiled = owned(m)
    with torch.no_grad(), counters.expect(recaptures=1, weights_not_merged=0):
        compiled(x)
        for dtype in (torch.float64, torch.float32, torch.float64):
            m.to(dtype)
            torch.testing.assert_close(compiled(x.to(dtype)), m(x.to(dtype)))
            assert is_merged(m)


def test_a_recapture_finds_the_weights_merged() -> None:
    m, x = untied(), torch.rand(3, 8)
    compiled = owned(m)
    with torch.no_grad(), counters.expect(recaptures=1, weights_merged=3, weights_merged_again=0):
        compiled(x)
        m.train()
        torch.testing.assert_close(compiled(x), m(x))


def test_several_regions_and_several_compiled_models_merge_once() -> None:
    m, x = untied(), torch.rand(3, 8)
    with torch.no_grad(), counters.expect(weights_merged=3, weights_merged_again=0):
        models = [owned(m, dynamic_shapes=how) for how in ("backed", "unbacked")]
        for rows in (1, 3):
            for compiled in models:
                torch.testing.assert_close(compiled(x[:rows]), m(x[:rows]))
    with torch.no_grad(), counters.expect(weights_merged_again=3):
        m.k.weight = nn.Parameter(torch.ones(4, 8))
        for rows in (1, 3):
            for compiled in models:
                torch.testing.assert_close(compiled(x[:rows]), m(x[:rows]))


def test_a_tie_that_merging_would_break_is_kept() -> None:
    m, x = untied(), torch.rand(3, 8)
    m.register_buffer("rows", m.k.weight.data[:2])
    compiled = owned(m)
    with torch.no_grad(), counters.expect(weights_merged=0, weights_not_merged=0):
        compiled(x)
        m.rows.fill_(7.0)
        torch.testing.assert_close(compiled(x), m(x))
    assert "k.weight shares memory with rows" in str(compiled.explain().to_dict())


def test_without_ownership_nothing_is_merged() -> None:
    m, x = untied(), torch.rand(3, 8)
    before = [(p.data_ptr(), p.untyped_storage()._cdata) for p in m.parameters()]
    config = {"backend": "eager"}
    with counters.expect(weights_merged=0), torch.no_grad():
        torch.testing.assert_close(onegraph.compile(m, config=config)(x), m(x))
    assert before == [(p.data_ptr(), p.untyped_storage()._cdata) for p in m.parameters()]


def test_inductor_and_a_warm_start(fresh_cache: Path) -> None:
    for store in ("miss", "hit"):
        m, x = untied(), torch.rand(3, 8)
        compiled = owned(m, backend="inductor")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), m(x))
            m.k.weight = nn.Parameter(torch.ones(4, 8))
            torch.testing.assert_close(compiled(x), m(x))
            in_place(m)
            torch.testing.assert_close(compiled(x), m(x))
        pieces = compiled.explain().to_dict()["pieces"]
        assert {one["store"] for piece in pieces for one in piece["ranges"]} == {store}
        assert is_merged(m)


def test_an_owner_s_weights_are_looked_at_once_after_it_has_said_so() -> None:
    looks: list[int] = []
    m, x = module(), torch.randn(3, 8)
    weights = bound(m, told=looks.append)
    first = weights.run(x)
    m.q.weight = nn.Parameter(torch.randn_like(m.q.weight))
    assert torch.equal(weights.run(x), first), "nobody has said so yet"
    assert weights.fit()
    assert not torch.equal(weights.run(x), first)
    assert looks[0] == looks[1] != looks[2]


def test_what_an_owner_says_while_a_call_looks_is_not_lost() -> None:
    """Another thread replaces a weight and says so after this call's look, before the call is done."""
    m, x = module(), torch.randn(3, 8)
    other = nn.Parameter(torch.randn_like(m.q.weight))

    def told(look: int) -> None:
        if m.q.weight is not other:
            m.q.weight = other
            assert weights.fit()

    weights = bound(m, told=told)
    before = weights.run(x)
    after = weights.run(x)
    assert not torch.equal(before, after) and torch.equal(after, bound(m).run(x))
