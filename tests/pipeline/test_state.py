"""Python state that a trace has read: each change is seen at the next call, and told in the user's words."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import LlamaConfig, LlamaModel

import onegraph
from onegraph.compiled import MAX_TRACES
from onegraph.counters import counters
from onegraph.errors import ConfigError, OnegraphError, StateChangedError
from tests.compiled_parts import EAGERS_BITS

EAGER = {"backend": "eager", "passes": EAGERS_BITS}
ROWS = {"x": {0: Dim("rows", min=1, max=64)}}
SCALE = 2.0
TABLE = {"first": 1.0}
OFFSETS = [torch.ones(4)]


class Settings:
    """A plain object that the model reads."""

    power = 2

    def __init__(self) -> None:
        self.kind = "sum"
        self.limits = [1.0, 2.0]


def shifted(x: torch.Tensor, by: float = 3.0) -> torch.Tensor:
    return x + by


def closure(amount: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def add(x: torch.Tensor) -> torch.Tensor:
        return x + amount

    return add


ADD = closure(5.0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.alpha = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.alpha


class Model(nn.Module):
    """Reads state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.settings = Settings()
        self.flags = {"bias": True}
        self.extra = [torch.ones(4)]
        self.register_buffer("shift", torch.zeros(4))
        self.drop = nn.Dropout(0.0)
        self.zero = 0.0
        self.activation: Any = torch.nn.functional.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        if self.settings.kind == "sum":
            x = x + self.settings.limits[0] * SCALE * TABLE["first"]
        if self.flags["bias"] and "late" not in self.flags:
            x = x + self.extra[0] + OFFSETS[0]
        if hasattr(self, "optional"):
            x = x * 10
        if os.environ.get("MODEL_VARIANT") == "b":
            x = x * 7
        x = torch.copysign(torch.ones_like(x), torch.full_like(x, self.zero)) + x
        return self.drop(self.activation(ADD(shifted(x)) ** self.settings.power)) + self.shift


Change = Callable[[Model, pytest.MonkeyPatch], None]


def set_attribute(path: str, value: Any) -> Change:
    def change(model: Model, patch: pytest.MonkeyPatch) -> None:
        *parents, name = path.split(".")
        setattr(functools.reduce(getattr, parents, model), name, value)

    return change


def doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * 2


CHANGES: dict[str, tuple[Change, str]] = {
    "constant of a layer": (lambda m, p: setattr(m.layers[1], "alpha", 0.25), "self.layers.1.alpha"),
    "sign of zero": (set_attribute("zero", -0.0), "self.zero"),
    "not a number": (set_attribute("zero", float("nan")), "self.zero"),
    "int for float": (lambda m, p: setattr(m.layers[0], "alpha", 1), "self.layers.0.alpha"),
    "field of an object": (set_attribute("settings.kind", "none"), "self.settings.kind"),
    "another object": (lambda m, p: setattr(m, "settings", types.SimpleNamespace(kind="x", power=3)), "self.settings"),
    "element of a list": (lambda m, p: m.settings.limits.__setitem__(0, 9.0), "self.settings.limits[0]"),
    "class attribute": (lambda m, p: p.setattr(Settings, "power", 3), ".power"),
    "class attribute hidden": (lambda m, p: setattr(m.settings, "power", 3), "self.settings"),
    "value in a dict": (lambda m, p: m.flags.update(bias=False), "self.flags['bias']"),
    "key in a dict": (lambda m, p: m.flags.update(late=1), "self.flags"),
    "new attribute": (set_attribute("optional", 1), "self"),
    "activation": (set_attribute("activation", torch.nn.functional.silu), "self.activation"),
    "global number": (lambda m, p: p.setitem(globals(), "SCALE", -1.0), "SCALE"),
    "global table": (lambda m, p: p.setitem(TABLE, "first", 4.0), "TABLE['first']"),
    "global tensor in a list": (lambda m, p: p.setitem(globals(), "OFFSETS", [torch.zeros(4)]), "OFFSETS[0]"),
    "default": (lambda m, p: p.setattr(shifted, "__defaults__", (8.0,)), "shifted.__defaults__"),
    "function's code": (lambda m, p: p.setattr(shifted, "__code__", (lambda x, by: x - by).__code__), "shifted"),
    "closure cell": (lambda m, p: p.setattr(ADD.__closure__[0], "cell_contents", 6.0), "ADD"),  # type: ignore[index]
    "environment": (lambda m, p: p.setenv("MODEL_VARIANT", "b"), "os.environ"),
    "submodule swapped": (lambda m, p: m.layers.__setitem__(0, Layer()), "self.layers.0"),
    "submodule of another class": (lambda m, p: setattr(m.layers[0], "linear", nn.Identity()), "self.layers.0.linear"),
    "submodule added": (lambda m, p: m.layers.append(Layer()), "self.layers"),
    "method replaced": (lambda m, p: p.setattr(Layer, "forward", doubled), "Layer.forward"),
    "method of an instance": (
        lambda m, p: setattr(m.layers[0], "forward", types.MethodType(doubled, m.layers[0])),
        "self.layers.0",
    ),
    "hook on a layer": (lambda m, p: m.layers[0].register_forward_hook(lambda *args: args[2] + 1), "self.layers.0"),
    "hook on the module": (lambda m, p: m.register_forward_hook(lambda *args: args[2] + 1), "self._forward_hooks"),
    "hook that changes inputs": (
        lambda m, p: m.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        "self.layers.1",
    ),
    "tensor in a list": (lambda m, p: m.extra.__setitem__(0, torch.full((4,), 3.0)), "self.extra[0]"),
    "weights untied": (lambda m, p: setattr(m.layers[1].linear, "weight", nn.Parameter(torch.zeros(4, 4))), "weight"),
    "train": (lambda m, p: m.train(), "training"),
}


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.delenv("MODEL_VARIANT", raising=False)
    return monkeypatch


def model() -> Model:
    torch.manual_seed(0)
    made = Model().eval()
    made.layers[1].linear.weight = made.layers[0].linear.weight  # tied
    return made


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_state_is_seen_at_the_next_call(name: str, patch: pytest.MonkeyPatch) -> None:
    change, _ = CHANGES[name]
    module = model()
    compiled = onegraph.compile(module, dynamic_shapes=ROWS, config=EAGER)
    x = torch.randn(5, 4)
    with torch.no_grad():
        before = module(x)
        torch.testing.assert_close(compiled(x), before, rtol=0, atol=0)
        change(module, patch)
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(compiled(x[:2]), module(x[:2]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_state_is_an_error_where_that_is_asked_for(name: str, patch: pytest.MonkeyPatch) -> None:
    change, what = CHANGES[name]
    module = model()
    compiled = onegraph.compile(module, dynamic_shapes=ROWS, config={**EAGER, "on_state_change": "error"})
    x = torch.randn(5, 4)
    with torch.no_grad():
        compiled(x)
        change(module, patch)
        for _ in range(2):
            with pytest.raises(StateChangedError) as caught:
                compiled(x)
    assert what in "; ".join(entry.what for entry, _ in caught.value.changes)
    assert "was" in str(caught.value) and "now" in str(caught.value)


def test_the_error_names_the_line_that_read_the_value() -> None:
    module = model()
    compiled = onegraph.compile(module, config={**EAGER, "on_state_change": "error"})
    compiled(torch.ones(3, 4))
    module.layers[1].alpha = 0.75
    with pytest.raises(StateChangedError) as caught:
        compiled(torch.ones(3, 4))
    line = Layer.forward.__code__.co_firstlineno + 1
    assert f"self.layers.1.alpha was 0.5, and now is 0.75 (read at {__file__}:{line})" in str(caught.value)


def test_the_environment_is_compared_and_never_shown(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("SOME_TOKEN", "secret-value")
    module = model()
    compiled = onegraph.compile(module, config={**EAGER, "on_state_change": "error"})
    compiled(torch.ones(3, 4))
    patch.setenv("SOME_TOKEN", "secret-value-2")
    with pytest.raises(StateChangedError, match="SOME_TOKEN") as caught:
        compiled(torch.ones(3, 4))
    assert "secret" not in str(caught.value)
    assert "secret" not in str(compiled.explain().to_dict())


def test_a_state_that_comes_back_finds_its_trace() -> None:
    module = model()
    compiled = onegraph.compile(module, config=EAGER)
    x = torch.ones(3, 4)
    with torch.no_grad(), counters.expect(dynamo_compiles=2, recaptures=1):
        for alpha in (0.5, 0.25, 0.5, 0.25):
            module.layers[0].alpha = alpha
            torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)


def test_data_that_changes_in_place_is_no_change_of_state() -> None:
    module = model()
    compiled = onegraph.compile(module, config=EAGER)
    x = torch.ones(3, 4)
    with torch.no_grad(), counters.expect(dynamo_compiles=1):
        compiled(x)
        module.shift.fill_(4.0)
        module.extra[0].fill_(2.0)
        module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)


def test_a_replaced_parameter_is_used_without_another_capture() -> None:
    module = nn.Linear(4, 4)
    compiled = onegraph.compile(module, config=EAGER)
    x = torch.ones(3, 4)
    with torch.no_grad(), counters.expect(dynamo_compiles=1):
        compiled(x)
        module.weight = nn.Parameter(torch.zeros(4, 4))
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)


def test_a_module_whose_state_never_settles_runs_uncompiled_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    module = model()
    compiled = onegraph.compile(module, config=EAGER)
    x = torch.ones(3, 4)
    with torch.no_grad(), counters.expect(dynamo_compiles=MAX_TRACES, eager_calls=3):
        for step in range(MAX_TRACES + 3):
            module.layers[0].alpha = float(step)
            torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)
        module.layers[0].alpha = 0.0
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)
    told = [record.message for record in caplog.records if "runs uncompiled" in record.message]
    assert len(told) == 1 and "self.layers.0.alpha" in told[0]


def test_freeze_promises_that_nothing_changes() -> None:
    module = model()
    compiled = onegraph.compile(module, config={**EAGER, "freeze": True})
    x = torch.ones(3, 4)
    with torch.no_grad(), counters.expect(dynamo_compiles=1):
        before = compiled(x)
        module.layers[0].alpha = 100.0
        torch.testing.assert_close(compiled(x), before)
    assert {entry["checked"] for entry in compiled.explain().to_dict()["ledger"]["state"]} == {"never"}
    assert "freeze=True" in str(compiled.explain())


def test_an_owner_says_when_it_has_changed_its_module() -> None:
    module = model()
    compiled = onegraph.compile(module, config=EAGER, own_module=True)
    x = torch.ones(3, 4)
    with torch.no_grad():
        before = compiled(x)
        module.layers[0].alpha = 100.0
        torch.testing.assert_close(compiled(x), before)
        compiled.check_state()
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)
    assert {entry["checked"] for entry in compiled.explain().to_dict()["ledger"]["state"]} == {"event"}


def test_an_owner_gets_the_error_when_it_says_so() -> None:
    module = model()
    compiled = onegraph.compile(module, config={**EAGER, "on_state_change": "error"}, own_module=True)
    compiled(torch.ones(3, 4))
    compiled.check_state()
    module.layers[0].alpha = 100.0
    with pytest.raises(StateChangedError, match="self.layers.0.alpha"):
        compiled.check_state()


def test_two_instances_with_different_constants_never_share_a_trace() -> None:
    first, second = Layer(), Layer()
    second.load_state_dict(first.state_dict())
    second.alpha = -3.0
    x = torch.ones(3, 4)
    with torch.no_grad():
        for module in (first, second, first):
            torch.testing.assert_close(onegraph.compile(module)(x), module(x))


def test_a_function_with_a_closure_over_a_number_and_a_tensor() -> None:
    factor, bias = 2.0, torch.ones(4)

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * factor + bias

    compiled = onegraph.compile(scaled, config=EAGER)
    x = torch.ones(3, 4)
    torch.testing.assert_close(compiled(x), scaled(x))
    factor = 5.0
    torch.testing.assert_close(compiled(x), scaled(x))
    bias = torch.zeros(4)
    torch.testing.assert_close(compiled(x), scaled(x))


def test_state_inside_an_argument_that_is_an_object() -> None:
    def scaled(x: torch.Tensor, settings: Settings) -> torch.Tensor:
        return x * settings.power + settings.limits[1]

    settings = Settings()
    compiled = onegraph.compile(scaled, config=EAGER)
    x = torch.ones(3, 4)
    torch.testing.assert_close(compiled(x, settings), scaled(x, settings))
    settings.limits[1] = 7.0
    torch.testing.assert_close(compiled(x, settings), scaled(x, settings))
    settings.power = 4
    torch.testing.assert_close(compiled(x, settings), scaled(x, settings))


@pytest.mark.parametrize("enabled", [True, False])
def test_a_model_that_asks_for_the_grad_mode_gets_the_caller_s(enabled: bool) -> None:
    def asks(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if torch.is_grad_enabled() else x * 3

    compiled = onegraph.compile(asks, config=EAGER)
    x = torch.ones(3)
    for mode in (enabled, not enabled):
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(compiled(x), asks(x))


def test_torch_s_global_state_is_a_part_of_the_ledger() -> None:
    def made(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(3) + x.sum().long()

    compiled = onegraph.compile(made, config=EAGER)
    x = torch.ones(3)
    assert compiled(x).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert compiled(x).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert compiled(x).dtype == torch.float32


@torch._dynamo.assume_constant_result  # type: ignore[attr-defined]
def looked_up(index: int) -> float:
    return TABLE["first"] + index


def test_a_folded_question_to_the_interpreter_is_asked_again_on_every_call() -> None:
    def deep(x: torch.Tensor) -> torch.Tensor:
        return x * sys.getrecursionlimit()

    compiled = onegraph.compile(deep, config=EAGER)
    x = torch.ones(3)
    assert torch.equal(compiled(x), deep(x))
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + 1)
    try:
        assert torch.equal(compiled(x), x * (before + 1))
    finally:
        sys.setrecursionlimit(before)


def test_a_call_declared_constant_is_an_entry_for_another_process_to_ask_again() -> None:
    class Declared(nn.Module):
        @torch._dynamo.assume_constant_result  # type: ignore[attr-defined]
        def scale(self) -> float:
            return 3.0

        def forward(self, x: torch.Tensor, by_method: bool) -> torch.Tensor:
            return x * self.scale() if by_method else x * looked_up(1)

    compiled = onegraph.compile(Declared(), config=EAGER)
    x = torch.ones(3)
    torch.testing.assert_close(compiled(x, False), x * looked_up(1))
    ledger = compiled.explain().ledger
    (entry,) = [entry for entry in ledger.state if entry.what.endswith("looked_up(1)")]
    assert (entry.value, entry.checked, entry.portable) == (repr(looked_up(1)), "load", True)
    assert entry.user is not None and entry.user.startswith(__file__)
    assert ledger.unindexable == ()

    by_method = onegraph.compile(Declared(), config=EAGER)
    torch.testing.assert_close(by_method(x, True), x * 3)
    ledger = by_method.explain().ledger
    (entry,) = [entry for entry in ledger.state if entry.what.endswith("scale()")]
    assert (entry.value, entry.checked, entry.portable) == ("3.0", "never", False)
    assert any("scale() is 3.0, of this process alone" in reason for reason in ledger.unindexable)


class Mode:
    """Told apart by identity alone."""


IDENTICAL: dict[str, Callable[[], Any]] = {
    "object": Mode,
    "module": nn.Identity,
    "list": lambda: [1],
    "dict": dict,
    "function": lambda: lambda: 1,
    "tensor": lambda: torch.zeros(3),
}


@pytest.mark.parametrize("kind", IDENTICAL)
@pytest.mark.parametrize("same_first", [True, False], ids=["same first", "other first"])
def test_what_is_the_same_object_is_compared_again(kind: str, same_first: bool) -> None:
    make = IDENTICAL[kind]
    one, other = make(), make()
    owner = types.SimpleNamespace(mode=one if same_first else other)

    def branching(x: torch.Tensor) -> torch.Tensor:
        return x * 5 if owner.mode is one else x + 1

    compiled = onegraph.compile(branching, config=EAGER)
    x = torch.ones(3)
    for mode in (owner.mode, one, other, one):
        owner.mode = mode
        torch.testing.assert_close(compiled(x), branching(x))
    assert compiled.explain().ledger.unindexable == () or kind == "tensor"


def test_two_tensors_of_a_module_become_one_and_two_again() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((3,), 2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 5 if self.left is self.right else x + self.left + len({self.left, self.right})

    module = Tied()
    compiled = onegraph.compile(module, config=EAGER)
    x = torch.ones(3)
    two = module.right
    for right in (two, module.left, two):
        module.right = right
        torch.testing.assert_close(compiled(x), module(x))


def test_an_object_that_every_call_replaces_is_no_change_of_state() -> None:
    class Replacing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = Mode()
            self.twin = self.last

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 5 if self.twin is self.last else x + 1
            self.last = Mode()
            return y

    module, reference = Replacing(), Replacing()
    compiled = onegraph.compile(module, config=EAGER)
    x = torch.ones(3)
    with counters.expect(recaptures=1):  # the twin is another object from the second call on
        for _ in range(6):
            torch.testing.assert_close(compiled(x), reference(x))


def test_a_reference_to_a_nameless_thing_ties_a_trace_to_its_process() -> None:
    generator = torch.Generator()

    def shared(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if generator is not None else x

    compiled = onegraph.compile(shared, config=EAGER)
    compiled(torch.ones(3))
    assert all("generator" in reason for reason in compiled.explain().ledger.unindexable)


def test_a_trace_that_reads_a_property_with_another_answer_each_time_runs_right() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reads = [0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + len(self.reads)

    module = Counting()
    compiled = onegraph.compile(module, config=EAGER)
    x = torch.ones(3)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), module(x))
        module.reads.append(0)


def test_a_compiled_model_stands_for_its_module() -> None:
    module = model()
    compiled = onegraph.compile(module, config=EAGER)
    assert compiled.eval() is compiled and compiled.to(torch.float32) is compiled
    compiled.zero = -0.0
    assert str(module.zero) == "-0.0"
    assert compiled.state_dict().keys() == module.state_dict().keys()


def test_threads_that_call_while_state_changes_get_a_result_of_some_state() -> None:
    module = model()
    compiled = onegraph.compile(module, config=EAGER)
    x = torch.ones(3, 4)
    with torch.no_grad():
        allowed = []
        for alpha in (0.5, 0.25):
            module.layers[0].alpha = alpha
            allowed.append(compiled(x))
    wrong: list[Any] = []

    def call() -> None:
        with torch.no_grad():
            for _ in range(200):
                result = compiled(x)
                if not any(torch.equal(result, value) for value in allowed):
                    wrong.append(result)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(200):
        module.layers[0].alpha = (0.5, 0.25)[step % 2]
    for thread in threads:
        thread.join()
    assert not wrong


class TunedLlama(LlamaModel):
    """A subclass with state of its own."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.temperature = 1.0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        output = super().forward(input_ids=input_ids, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden / self.temperature


def test_state_of_a_transformers_model() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    module = TunedLlama(config).eval()
    compiled = onegraph.compile(module, dynamic_shapes={"input_ids": {1: Dim("tokens", min=2, max=64)}}, config=EAGER)
    ids = torch.arange(6)[None]
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: setattr(module, "temperature", 0.5),
        lambda: setattr(module.layers[0].input_layernorm, "variance_epsilon", 0.5),
        lambda: setattr(module.layers[1].self_attn, "scaling", 2.0),
        lambda: setattr(module.layers[1].mlp, "act_fn", nn.ReLU()),
        lambda: module.layers.__setitem__(0, type(module.layers[0])(config, 0).eval()),
    ]
    with torch.no_grad():
        for change in changes:
            change()
            torch.testing.assert_close(compiled(ids), module(ids))
            torch.testing.assert_close(compiled(ids[:, :3]), module(ids[:, :3]))


def test_on_state_change_takes_two_words() -> None:
    with pytest.raises(ConfigError, match="on_state_change"):
        onegraph.compile(model(), config={"on_state_change": "warn"})


def test_explain_says_what_a_mode_can_not_see() -> None:
    for config, expected in ({}, None), ({"freeze": True}, "any change of Python state"):
        compiled = onegraph.compile(model(), dynamic_shapes=ROWS, config={**EAGER, **config})
        with torch.no_grad():
            compiled(torch.ones(3, 4))
        told = compiled.explain().to_dict()["ledger"]["not_seen"]
        assert told is None if expected is None else told.startswith(expected)
        assert ("not seen" in str(compiled.explain())) is (expected is not None)
        assert compiled.explain().to_dict()["graph"]["ops"] >= 1


def scaled_by(factor: float) -> Callable[..., torch.Tensor]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * factor

    return forward


def module_of(forward: Callable[..., torch.Tensor], kept: Any = None, **members: Any) -> Any:
    """A module of a class of its own."""
    module = type("Case", (nn.Module,), {"forward": forward, **members})()
    module.kept = kept
    return module


def by_default(self: Any, x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    return x * factor


def by_keyword_default(self: Any, x: torch.Tensor, *, factor: float = 2.0) -> torch.Tensor:
    return x * factor


def by_gradient(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * (2 if self.kept.requires_grad else 3) + self.kept


def by_attribute_of_weight(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * (2 if hasattr(self.kept, "scale") else 3) + self.kept


def by_class_method(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x * self.by()


def by_missing_key(self: Any, x: torch.Tensor) -> torch.Tensor:
    try:
        return x * self.kept["factor"]
    except KeyError:
        return x * 3


def by_missing_attribute(self: Any, x: torch.Tensor) -> torch.Tensor:
    try:
        return x * self.kept.factor
    except AttributeError:
        return x * 3


def by_own_missing_attribute(self: Any, x: torch.Tensor) -> torch.Tensor:
    try:
        return x * self.factor
    except AttributeError:
        return x * 3


class Fallback:
    def __init__(self) -> None:
        self.values = {"factor": 2.0}

    def __getattr__(self, name: str) -> Any:
        if name == "values" or name.startswith("__"):  # asked by copy
            raise AttributeError
        return self.values[name]


PYTHON_MODULE: Any = types.ModuleType("python_module")
RENAMED = os.environ

LATE: dict[str, tuple[Callable[[], Any], Callable[[Any, pytest.MonkeyPatch], Any]]] = {
    "default": (
        lambda: module_of(by_default),
        lambda m, p: p.setattr(by_default, "__defaults__", (3.0,)),
    ),
    "keyword default": (
        lambda: module_of(by_keyword_default),
        lambda m, p: p.setattr(by_keyword_default, "__kwdefaults__", {"factor": 3.0}),
    ),
    "another closure of the same code": (
        lambda: module_of(scaled_by(2.0)),
        lambda m, p: setattr(type(m), "forward", scaled_by(3.0)),
    ),
    "requires_grad": (
        lambda: module_of(by_gradient, nn.Parameter(torch.ones(4))),
        lambda m, p: m.kept.requires_grad_(False),
    ),
    "attribute of a weight": (
        lambda: module_of(by_attribute_of_weight, nn.Parameter(torch.ones(4))),
        lambda m, p: setattr(m.kept, "scale", 1),
    ),
    "class of a submodule": (
        lambda: module_of(lambda self, x: self.kept(x - 5), nn.ReLU()),
        lambda m, p: setattr(m.kept, "__class__", nn.SiLU),
    ),
    "class method": (
        lambda: module_of(by_class_method, by=classmethod(lambda cls: 2)),
        lambda m, p: setattr(type(m), "by", classmethod(lambda cls: 5)),
    ),
    "attribute that only __getattr__ had": (
        lambda: module_of(lambda self, x: x * self.kept.factor, Fallback()),
        lambda m, p: setattr(m.kept, "factor", 9.0),
    ),
    "missing key": (lambda: module_of(by_missing_key, {}), lambda m, p: m.kept.update(factor=9.0)),
    "missing attribute": (
        lambda: module_of(by_missing_attribute, types.SimpleNamespace()),
        lambda m, p: setattr(m.kept, "factor", 9.0),
    ),
    "missing attribute of the module": (
        lambda: module_of(by_own_missing_attribute),
        lambda m, p: setattr(m, "factor", 9.0),
    ),
    "missing attribute of a Python module": (
        lambda: module_of(lambda self, x: x * getattr(PYTHON_MODULE, "factor", 2.0)),
        lambda m, p: p.setattr(PYTHON_MODULE, "factor", 9.0, raising=False),
    ),
    "global that hides a builtin": (
        lambda: module_of(lambda self, x: x * abs(-3)),
        lambda m, p: p.setitem(globals(), "abs", lambda value: 100),
    ),
    "set": (lambda: module_of(lambda self, x: x * sum(self.kept), {1, 2}), lambda m, p: m.kept.add(3)),
    "list in a tuple": (
        lambda: module_of(lambda self, x: x * sum(map(sum, self.kept)), ([1, 2], [3])),
        lambda m, p: m.kept[1].append(3),
    ),
    "iterator": (lambda: module_of(lambda self, x: x * next(self.kept), itertools.count(1)), lambda m, p: None),
    "environment by another name": (
        lambda: module_of(lambda self, x: x * 2 if RENAMED.get("MODEL_VARIANT") else x * 3),
        lambda m, p: p.setenv("MODEL_VARIANT", "b"),
    ),
    "weight that becomes a plain tensor": (
        lambda: module_of(lambda self, x: x + self.kept, nn.Parameter(torch.ones(4))),
        lambda m, p: m.__dict__.update(kept=m._parameters.pop("kept").detach() * 3),
    ),
}


@pytest.mark.parametrize("name", LATE)
def test_what_dynamo_does_not_guard_is_compared_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, change = LATE[name]
    module = make()
    eager = copy.deepcopy(module)
    compiled = onegraph.compile(module, config=EAGER)
    x = torch.ones(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x), rtol=0, atol=0)
        change(module, monkeypatch)
        if name != "iterator":
            eager = module
        torch.testing.assert_close(compiled(x), eager(x), rtol=0, atol=0)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_deleted_weight_is_an_error_of_ours(freeze: bool) -> None:
    module = nn.Linear(4, 4)
    compiled = onegraph.compile(module, config={**EAGER, "freeze": freeze})
    compiled(torch.ones(3, 4))
    del module.bias
    with pytest.raises(OnegraphError):
        compiled(torch.ones(3, 4))


@pytest.mark.parametrize(("start", "step"), [(1, -1), (-5, 1)])
def test_a_counter_below_zero_counts_on(start: int, step: int) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.kept += step
        return x * 2

    module = module_of(forward, start)
    compiled = onegraph.compile(module, config=EAGER)
    for _ in range(3):
        torch.testing.assert_close(compiled(torch.ones(3, 4)), torch.full((3, 4), 2.0))
    assert module.kept == start + 3 * step


def test_an_index_by_a_counter_that_torch_takes_for_a_constant() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.kept += 1
        return x[:, self.kept - 1]

    compiled = onegraph.compile(module_of(forward, 0), config=EAGER)
    x = torch.arange(12.0).reshape(3, 4)
    for index in range(3):
        torch.testing.assert_close(compiled(x), x[:, index])


def test_a_range_that_ends_elsewhere_is_another_argument() -> None:
    compiled = onegraph.compile(lambda x, numbers: x * numbers.stop, config=EAGER)
    compiled(torch.ones(3), range(0, 3, 2))
    with pytest.raises(OnegraphError):
        compiled(torch.ones(3), range(0, 4, 2))
