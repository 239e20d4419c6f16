"""Modules behind decorators, and transformers' classes called as they are."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.errors import CaptureError, ConfigError, InputContractError, ShapeOutOfRangeError

NUM_TOKENS = Dim("num_tokens", min=2, max=64)
X = {"x": {0: NUM_TOKENS}}


def handed_on(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*everything: Any, **named: Any) -> Any:
        return function(*everything, **named)

    return wrapper


def of_a_module(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return wrapper


def with_one_more(function: Callable[..., Any]) -> Callable[..., Any]:
    """Its function's third argument is its own."""

    @functools.wraps(function)
    def wrapper(self: Any, x: torch.Tensor) -> Any:
        return function(self, x, {"shift": x + 1})

    return wrapper


DECORATORS = {
    "no_grad": torch.no_grad(),
    "inference_mode": torch.inference_mode(),
    "autocast": torch.autocast("cpu", enabled=False),
    "wraps": handed_on,
    "wraps with self": of_a_module,
}


def decorated(decorator: Callable[..., Any]) -> nn.Module:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.scale = 2.0
            self.register_buffer("calls", torch.zeros(()))

        @decorator
        def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor] | None = None, *, bias: float = 0.0) -> Any:
            self.calls.add_(1)
            result = self.linear(x).relu() * self.scale + bias
            return result if more is None else result + more["shift"]

    torch.manual_seed(0)
    return Layer()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", DECORATORS)
def test_a_decorated_forward_equals_eager(name: str, backend: str) -> None:
    module, reference = decorated(DECORATORS[name]), decorated(DECORATORS[name])
    shapes = {"x": X["x"], "more": {"shift": X["x"]}}
    compiled = onegraph.compile(module, dynamic_shapes=shapes, config={"backend": backend})
    for rows in (4, 2, 33):
        x, more = torch.randn(rows, 4), {"shift": torch.randn(rows, 4)}
        torch.testing.assert_close(compiled(x, more=more, bias=1.5), reference(x, more=more, bias=1.5).clone())
    assert module.calls == reference.calls == 3
    x, more = torch.randn(5, 4), {"shift": torch.randn(5, 4)}
    with pytest.raises(ShapeOutOfRangeError, match="x has size 65 at dim 0"):
        compiled(torch.randn(65, 4), more=more, bias=1.5)
    with pytest.raises(InputContractError, match=r"more\['shift'\] broke the input contract: its dtype"):
        compiled(x, more={"shift": more["shift"].double()}, bias=1.5)
    with pytest.raises(InputContractError, match="more broke the input contract: its keys"):
        compiled(x, more={**more, "other": x}, bias=1.5)
    with pytest.raises(InputContractError, match="bias broke the input contract: its value was 1.5"):
        compiled(x, more=more, bias=2.5)
    module.scale = reference.scale = 3.0
    torch.testing.assert_close(compiled(x, more=more, bias=1.5), reference(x, more=more, bias=1.5).clone())


def test_a_decorator_that_adds_an_argument() -> None:
    module = decorated(with_one_more)
    compiled = onegraph.compile(module, dynamic_shapes=X, config={"backend": "eager"})
    for rows in (4, 9):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(compiled(x), module(x).detach())


def test_what_a_decorator_sees_of_the_call_is_part_of_the_contract() -> None:
    """It may treat `f(x)` and `f(x=x)` in two ways."""
    compiled = onegraph.compile(decorated(handed_on), dynamic_shapes=X, config={"backend": "eager"})
    compiled(torch.randn(4, 4))
    with pytest.raises(InputContractError, match=r"its length was 1 .* one of length 0(?s:.*)as in the first call"):
        compiled(x=torch.randn(4, 4))


SCALE = torch.ones(4)


@pytest.mark.parametrize("decorator", [torch.no_grad(), handed_on], ids=["no_grad", "wraps"])
def test_a_decorated_function_follows_its_global_tensor(
    decorator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    @decorator
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * SCALE

    monkeypatch.setitem(globals(), "SCALE", torch.ones(4))
    compiled = onegraph.compile(scaled, dynamic_shapes=X, config={"backend": "eager"})
    x = torch.randn(3, 4)
    assert compiled(x).equal(x)
    SCALE.mul_(2)
    assert compiled(x).equal(x * 2)
    monkeypatch.setitem(globals(), "SCALE", torch.full((4,), 5.0))
    assert compiled(x).equal(x * 5)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Static(nn.Module):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Holder:
    """An object that isn't a module."""

    def __init__(self) -> None:
        self.module, self.gain = Scaled(), 3.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x) * self.gain


def with_a_forward(make: Callable[[nn.Module], Callable[..., Any]]) -> nn.Module:
    module = Scaled()
    module.forward = make(module)  # type: ignore[method-assign]
    return module


def added_one(forward: Callable[..., Any], x: torch.Tensor) -> Any:
    return forward(x) + 1


@pytest.mark.parametrize(
    "make",
    [
        Static,
        Holder,
        lambda: with_a_forward(lambda module: lambda x: x * module.scale),
        lambda: with_a_forward(lambda module: handed_on(module.forward)),
        lambda: with_a_forward(lambda module: functools.partial(added_one, module.forward)),
    ],
    ids=["static", "object", "lambda", "wrapped", "partial"],
)
def test_a_forward_that_is_no_method_of_its_class(make: Callable[[], Any]) -> None:
    model = make()
    compiled = onegraph.compile(model, dynamic_shapes=X, config={"backend": "eager"})
    for rows in (4, 9):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(compiled(x), model(x).detach())
    if isinstance(model, Holder):
        model.gain = 5.0
        torch.testing.assert_close(compiled(x), model(x).detach())


def replaced_by_another(module: nn.Module) -> None:
    module.forward = lambda x: x * 9  # type: ignore[method-assign]


def taken_back(module: nn.Module) -> None:
    vars(module).pop("forward", None)


def patched_once_more(module: nn.Module) -> None:
    old = module.forward
    module.forward = handed_on(lambda x: old(x) * 7)  # type: ignore[method-assign]


def of_the_class(module: nn.Module) -> None:
    type(module).forward = staticmethod(lambda x: x * 11)  # type: ignore[method-assign]


CHANGES = [replaced_by_another, taken_back, patched_once_more, of_the_class]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("start", ["class", "instance", "static"])
def test_another_forward_is_captured_anew(start: str, change: Callable[[nn.Module], None]) -> None:
    class Mine(Static if start == "static" else Scaled):  # type: ignore[misc]
        pass

    module = Mine()
    compiled = onegraph.compile(module, dynamic_shapes=X, config={"backend": "eager"})
    x = torch.randn(4, 4)
    if start == "instance":
        module.forward = lambda x: x * 3
    for step in (lambda module: None, change, replaced_by_another, taken_back):
        step(module)
        torch.testing.assert_close(compiled(x), module(x).detach())


def taking_a_flag(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        flag = kwargs.pop("flag", 1.0)
        return function(self, *args, **kwargs) * flag

    return wrapper


def with_a_flag_in_front(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, flag: Any, *args: Any) -> Any:
        return function(self, *args) * flag

    return wrapper


def flagged(decorator: Callable[..., Any]) -> nn.Module:
    class Layer(nn.Module):
        @decorator
        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            return x + 1 if y is None else x + y

    return Layer()


@pytest.mark.parametrize("rows", [3, 5])
def test_a_decorator_with_arguments_of_its_own(rows: int) -> None:
    shapes = {"x": X["x"], "y": X["x"]}
    x, y = torch.randn(rows, 4), torch.randn(rows, 4)
    behind = onegraph.compile(flagged(taking_a_flag), dynamic_shapes=shapes, config={"backend": "eager"})
    in_front = onegraph.compile(flagged(with_a_flag_in_front), dynamic_shapes=shapes, config={"backend": "eager"})
    behind(torch.randn(4, 4), torch.randn(4, 4), flag=2.0)
    in_front(2.0, torch.randn(4, 4), torch.randn(4, 4))
    torch.testing.assert_close(behind(x, y, flag=2.0), (x + y) * 2)
    torch.testing.assert_close(in_front(2.0, x, y), (x + y) * 2)
    misspelt = onegraph.compile(flagged(with_a_flag_in_front), dynamic_shapes={"xx": X["x"]})
    with pytest.raises(ConfigError, match="dynamic_shapes names 'xx', which is no argument"):
        misspelt(2.0, x)


def untyped(function):  # type: ignore[no-untyped-def]
    @functools.wraps(function)
    def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
        flag = kwargs.pop("flag", 1.0)
        return function(*args, **kwargs) * flag

    return wrapper


def test_a_plain_function_behind_a_decorator_with_an_argument_of_its_own() -> None:
    @untyped
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    compiled = onegraph.compile(function, dynamic_shapes=X, config={"backend": "eager"})
    for rows in (4, 7):
        torch.testing.assert_close(compiled(torch.ones(rows, 4), flag=3.0), torch.full((rows, 4), 6.0))


class Called(nn.Module):
    def __call__(self, x: torch.Tensor, extra: float = 2.0) -> Any:
        return super().__call__(x) * extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Decorator:
    """An object in a method's place."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, owner: Any, kind: type) -> Any:
        return self if owner is None else types.MethodType(self, owner)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) * 3


class Decorated(nn.Module):
    @Decorator
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_a_call_of_its_own() -> None:
    module = Called()
    compiled = onegraph.compile(module, dynamic_shapes=X, config={"backend": "eager"})
    for rows in (4, 5):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(compiled(x), module(x))


def counting() -> Callable[..., Any]:
    calls = 0

    def function(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x * calls

    return function


class Tensors:
    """An object that isn't a module, and holds a tensor."""

    def __init__(self) -> None:
        self.weight = torch.ones(4)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def drawn(x: torch.Tensor) -> Any:
    yield x


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (Tensors().run, "the tensor self.weight, of an object that is no nn.Module"),
        (Decorated(), "Dynamo does not know how to trace"),
        (counting(), "the traced function assigns 'calls', a variable of the function around it"),
        (drawn, "drawn can't be captured: its body runs when its result is iterated or awaited"),
        (nn.ReLU, "can't be captured: it is a type"),
        (functools.partial(torch.mul, other=2), "can't be captured: it is a partial"),
    ],
    ids=["tensor of an object", "object as decorator", "nonlocal", "generator", "class", "partial"],
)
def test_what_cannot_be_captured_is_told(function: Any, told: str) -> None:
    compiled = onegraph.compile(function, dynamic_shapes={}, config={"backend": "eager"})
    with pytest.raises(CaptureError, match=told):
        compiled(torch.randn(3, 4))


def test_attributes_of_a_compiled_module_are_set_and_deleted_on_the_module() -> None:
    module = Scaled()
    compiled = onegraph.compile(module, dynamic_shapes=X)
    compiled.note = 1
    assert module.note == 1
    del compiled.note
    assert not hasattr(module, "note")


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
MODELS = {
    "LlamaForCausalLM": transformers.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2),
    "BertModel": transformers.BertConfig(**SMALL, intermediate_size=64),
    "GPT2Model": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0),
}


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by position"])
@pytest.mark.parametrize("name", MODELS)
def test_a_transformers_class_called_as_it_is(name: str, by_name: bool) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, name)(MODELS[name]).eval()
    shapes = {"input_ids": {1: NUM_TOKENS}}
    compiled = onegraph.compile(model, dynamic_shapes=shapes, config={"backend": "eager"})
    options = {} if name == "BertModel" else {"use_cache": False}
    for num_tokens in (8, 17):
        ids = torch.randint(0, 64, (1, num_tokens))
        args, kwargs = ((), {"input_ids": ids}) if by_name else ((ids,), {})
        with torch.no_grad():
            result, expected = compiled(*args, **kwargs, **options), model(*args, **kwargs, **options)
        assert type(result) is type(expected)
        torch.testing.assert_close(result[0], expected[0])


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize(
    "cut", [lambda t: t[:, :4], lambda t: t[::2], lambda t: t[:, 4:]], ids=["left", "rows", "right"]
)
def test_a_slice_as_argument_keeps_its_strides(cut: Callable[[torch.Tensor], torch.Tensor], backend: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1).cumsum(0) + x.view(x.shape[0], 1, -1).sum()

    compiled = onegraph.compile(function, dynamic_shapes=X, config={"backend": backend})
    for rows in (6, 4, 40):
        part = cut(torch.randn(rows, 12))
        torch.testing.assert_close(compiled(part), function(part))
    with pytest.raises(InputContractError, match=r"x broke the input contract: its strides was \(\d+, 1\)"):
        compiled(torch.randn(6, part.shape[1]))
