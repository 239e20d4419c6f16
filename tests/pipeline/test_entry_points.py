"""The other ways in: the torch.compile backend and the class decorator."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.counters import counters
from onegraph.errors import ConfigError

NUM_TOKENS = Dim("num_tokens", min=1, max=64)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_the_torch_compile_backend_keeps_dynamos_guards_and_stores(fresh_cache: Any) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 2 if x.shape[0] % 2 else x.cos() * 3

    with torch.no_grad():
        stock = torch.compile(model, backend="onegraph", dynamic=True)
        with counters.expect(inductor_compiles=2, store_writes=2, graphs_captured=0):
            for size in (4, 5, 6, 7):
                x = torch.randn(size, 3)
                torch.testing.assert_close(stock(x), model(x))
        torch._dynamo.reset()
        with counters.expect(inductor_compiles=0, store_hits=2):
            again = torch.compile(model, backend="onegraph", dynamic=True)
            for size in (4, 5, 6, 7):
                x = torch.randn(size, 3)
                torch.testing.assert_close(again(x), model(x))


def test_guards_that_inductor_adds_hold_on_a_warm_start_too(fresh_cache: Any) -> None:
    """Whatever compiling assumes about a size must recompile a call that breaks it, also after a store hit."""

    def model(x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 4, 2).sum(1).sort(0)[0]

    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(model, backend="onegraph", dynamic=True)
            for size in (8, 16, 40000):
                x = torch.randn(size, 2)
                torch.testing.assert_close(compiled(x), model(x))


def test_the_backend_takes_options_and_graph_breaks() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    with torch.no_grad(), counters.expect(inductor_compiles=0):
        compiled = torch.compile(model, backend="onegraph", options={"backend": "eager"})
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 4.0))
    with pytest.raises(Exception, match="backendd"), torch.no_grad():
        torch.compile(model, backend="onegraph", options={"backendd": "eager"})(torch.ones(5))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.sin(torch.relu(layer(x)) + x)
        return x


def test_the_backend_splits_and_compiles_equal_pieces_once(fresh_cache: Any) -> None:
    module, splits = Tower(), {"splitting_ops": ["torch.sin"]}
    for found in ({"inductor_compiles": 1, "store_writes": 1}, {"inductor_compiles": 0, "store_hits": 1}):
        torch._dynamo.reset()
        stock = torch.compile(module, backend="onegraph", dynamic=True, options=splits)
        with torch.no_grad(), counters.expect(**found):
            for size in (3, 8, 100):
                x = torch.randn(size, 4)
                torch.testing.assert_close(stock(x), module(x))


def test_the_backend_changes_what_the_module_changes_across_pieces(fresh_cache: Any) -> None:
    def model(x: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = seen[1:]
        y = torch.sin(x * 2)
        rows.add_(y.sum())
        return torch.sin(y) + rows.sum(), rows

    stock = torch.compile(model, backend="onegraph", dynamic=True, options={"splitting_ops": ["torch.sin"]})
    with torch.no_grad():
        for size in (3, 8):
            x, seen, expected_seen = torch.randn(size, 4), torch.ones(5), torch.ones(5)
            torch.testing.assert_close(stock(x, seen), model(x, expected_seen))
            torch.testing.assert_close(seen, expected_seen)


def test_floats_are_constants_that_a_call_with_another_one_recompiles(fresh_cache: Any) -> None:
    """Dynamo makes them inputs with dynamic=True, also the eps of a norm."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
            return torch.relu(self.norm(x)) * scale

    module = Model()
    stock = torch.compile(module, backend="onegraph", dynamic=True)
    with torch.no_grad():
        for size, scale in ((3, 1.5), (8, 1.5), (8, 2.5), (3, 2.5)):
            x = torch.randn(size, 4)
            torch.testing.assert_close(stock(x, scale), module(x, scale))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splitting_ops": ["onegraph::paged_attentoin"]}, "there is no such operator"),
        ({"splitting_ops": ["torch.sin"], "eager_pieces": [11]}, "pieces are 0..9"),
    ],
)
def test_the_backend_refuses_what_it_cannot_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message), torch.no_grad():
        torch.compile(Tower(), backend="onegraph", options=options)(torch.ones(3, 4))


def test_the_backend_refuses_gradients() -> None:
    compiled = torch.compile(nn.Linear(3, 3), backend="onegraph")
    with pytest.raises(Exception, match="needs gradients"):
        compiled(torch.ones(2, 3))


@onegraph.support_torch_compile(dynamic_shapes={"x": {0: NUM_TOKENS}}, config={"backend": "eager"})
class Decorated(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factor


def test_a_decorated_class_compiles_each_instance() -> None:
    first, second = Decorated(2.0), Decorated(3.0)
    with torch.no_grad():
        expected = [m.linear(torch.ones(3, 4)) * m.factor for m in (first, second)]
    with counters.expect(graphs_captured=2):
        for module, value in zip((first, second), expected, strict=True):
            torch.testing.assert_close(module(torch.ones(3, 4)), value)
    with counters.expect(graphs_captured=0):
        assert first(torch.ones(64, 4)).shape == (64, 4)
    assert first.onegraph_compiled.explain().to_dict()["dims"][0]["name"] == "num_tokens"


def test_a_decorated_instance_can_be_warmed_up_copied_and_pickled() -> None:
    module = Decorated(2.0)
    module.onegraph_compiled.warm_up({"x": torch.ones(3, 4)})
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(torch.ones(2, 4)), module(torch.ones(2, 4)))


def test_a_decorated_module_inside_another_compile_is_traced_through() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Decorated(2.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 1

    outer = Outer()
    compiled = onegraph.compile(outer, dynamic_shapes={"x": {0: NUM_TOKENS}}, config={"backend": "eager"})
    with counters.expect(graphs_captured=1), torch.no_grad():
        torch.testing.assert_close(compiled(torch.ones(3, 4)), outer.inner.linear(torch.ones(3, 4)) * 2 + 1)


def test_hooks_run_around_a_decorated_forward() -> None:
    module = Decorated(2.0)
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    module(torch.ones(3, 4))
    module(torch.ones(4, 4))
    assert seen == [(3, 4), (4, 4)]


def test_only_module_classes_can_be_decorated() -> None:
    with pytest.raises(ConfigError, match="nn.Module"):
        onegraph.support_torch_compile()(dict)  # type: ignore[type-var]


def test_a_decorated_subclass_and_its_decorated_base_are_compiled_apart() -> None:
    for config in ({"mode": "NONE"}, {"backend": "eager"}):

        @onegraph.support_torch_compile(config=config)
        class Base(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + 1

        @onegraph.support_torch_compile(config=config)
        class Derived(Base):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) * 2

        module = Derived()
        assert torch.equal(module(torch.ones(2)), torch.full((2,), 4.0))
        assert torch.equal(Base.forward(module, torch.ones(2)), torch.full((2,), 2.0))


def test_a_shallow_copy_of_a_decorated_instance_is_its_own() -> None:
    @onegraph.support_torch_compile(config={"backend": "eager"})
    class Scale(nn.Module):
        factor = 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    module = Scale()
    module(torch.ones(2))
    other = copy.copy(module)
    other.factor = 5
    assert torch.equal(other(torch.ones(2)), torch.full((2,), 5.0))
    assert torch.equal(module(torch.ones(2)), torch.full((2,), 2.0))
