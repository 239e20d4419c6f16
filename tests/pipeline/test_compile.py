"""onegraph.compile from outside: results, effects, sizes, checks. Real Inductor unless a test says otherwise."""

from __future__ import annotations

import copy
import enum
import gc
import threading
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers.modeling_outputs import BaseModelOutput

import onegraph
from onegraph.counters import counters
from onegraph.errors import (
    CaptureError,
    ConfigError,
    ConstraintError,
    InputContractError,
    ShapeOutOfRangeError,
)
from onegraph.torch_compat import inductor as torch_inductor

NUM_TOKENS = Dim("num_tokens", min=1, max=64)
X = {"x": {0: NUM_TOKENS}}
BACKENDS = ["eager", "aot_eager", "inductor"]


class Tower(nn.Module):
    """A few layers, a buffer that counts, an optional cache that is written in place, a structured result."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.register_buffer("calls", torch.zeros(1))
        self.calls: torch.Tensor

    def forward(self, x: torch.Tensor, positions: torch.Tensor, caches: Any = None, *, scale: float = 2.0) -> Any:
        hidden = x
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = hidden + positions[:, None]
        self.calls.add_(1)
        if caches is not None:
            caches[0].add_(hidden.sum(0))
        return {"scaled": hidden * scale, "pair": (hidden.sum(), None), "same": x, "flat": x.view(-1)}


def tower_inputs(size: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 8, generator=generator)
    return x, torch.arange(size, dtype=torch.float32), [torch.zeros(8)]


def compiled_tower(backend: str) -> tuple[Any, Tower]:
    torch.manual_seed(0)
    module = Tower()
    reference = copy.deepcopy(module)
    shapes = {"x": {0: NUM_TOKENS}, "positions": (NUM_TOKENS,)}
    return onegraph.compile(module, dynamic_shapes=shapes, config={"backend": backend}), reference


@pytest.mark.parametrize("first", [1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_and_effects_are_the_modules_own_at_every_size(backend: str, first: int) -> None:
    compiled, reference = compiled_tower(backend)
    for size in (first, 1, 2, 7, 64):
        x, positions, caches = tower_inputs(size)
        expected_caches = [torch.zeros(8)]
        out = compiled(x, positions, caches)
        expected = reference(x, positions, expected_caches)
        assert list(out) == list(expected)
        torch.testing.assert_close(out["scaled"], expected["scaled"].detach())
        torch.testing.assert_close(out["pair"][0], expected["pair"][0].detach(), rtol=1e-4, atol=1e-4)
        assert type(out["pair"]) is tuple and out["pair"][1] is None
        assert out["same"] is x
        assert out["flat"].data_ptr() == x.data_ptr() and out["flat"].shape == (size * 8,)
        torch.testing.assert_close(caches[0], expected_caches[0].detach(), rtol=1e-4, atol=1e-4)
        assert torch.equal(compiled.original.calls, reference.calls)


def test_nothing_is_traced_after_the_first_call() -> None:
    compiled, _ = compiled_tower("eager")
    compiled(*tower_inputs(5))
    with (
        counters.expect(dynamo_compiles=0, graphs_captured=0),
        torch.compiler.set_stance("fail_on_recompile"),
    ):
        for size in (1, 2, 3, 64):
            compiled(*tower_inputs(size))


@pytest.mark.parametrize(("backend", "inductor", "aot"), [("eager", 0, 0), ("aot_eager", 0, 1), ("inductor", 1, 0)])
def test_each_backend_compiles_what_it_says(backend: str, inductor: int, aot: int, fresh_cache: Any) -> None:
    compiled, _ = compiled_tower(backend)
    with counters.expect(graphs_captured=1, inductor_compiles=inductor, aot_compiles=aot):
        compiled(*tower_inputs(3))


def test_mode_none_runs_the_module_itself() -> None:
    module = Tower()
    compiled = onegraph.compile(module, config={"mode": "NONE"})
    with counters.expect(dynamo_compiles=0, graphs_captured=0, inductor_compiles=0):
        out = compiled(*tower_inputs(3))
    assert out["scaled"].requires_grad, "the module itself gives outputs with gradients"


def test_mode_stock_is_torch_compile_with_its_guards() -> None:
    compiled = onegraph.compile(lambda x: x * 2 if x.shape[0] % 2 else x * 3, config={"mode": "STOCK_TORCH_COMPILE"})
    with counters.expect(graphs_captured=0):
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
        assert torch.equal(compiled(torch.ones(4)), torch.full((4,), 3.0))


def test_mode_trace_once_captures_one_graph(fresh_cache: Any) -> None:
    module, shapes = Tower(), {"x": {0: NUM_TOKENS}, "positions": {0: NUM_TOKENS}}
    compiled = onegraph.compile(module, dynamic_shapes=shapes, config={"mode": "DYNAMO_TRACE_ONCE"})
    with counters.expect(graphs_captured=1, inductor_compiles=1):
        compiled(*tower_inputs(3))
    assert len(compiled.explain().to_dict()["pieces"]) == 1


@pytest.mark.parametrize("size", [0, 65])
def test_a_size_outside_the_declared_range_is_an_error_that_names_it(size: int) -> None:
    compiled = onegraph.compile(lambda x: x + 1, dynamic_shapes=X, config={"backend": "eager"})
    compiled(torch.zeros(3, 2))
    with pytest.raises(ShapeOutOfRangeError, match=rf"x has size {size} at dim 0.*num_tokens = 1\.\.64"):
        compiled(torch.zeros(size, 2))


BROKEN_CALLS = {
    "dtype": (lambda x, p, c: (x.double(), p, c), r"x broke the input contract: its dtype was torch.float32"),
    "rank": (lambda x, p, c: (x[None], p, c), r"its rank was 2"),
    "static size": (lambda x, p, c: (x[:, :7].contiguous(), p, c), r"its size of dim 1 was 8"),
    "strides": (lambda x, p, c: (torch.zeros(8, x.shape[0]).t(), p, c), r"its strides"),
    "two sizes of one dim": (lambda x, p, c: (x, p[:-1], c), r"num_tokens, as in x\[0\]"),
    "structure": (lambda x, p, c: (x, p, None), r"caches broke the input contract: its type was list"),
    "length": (lambda x, p, c: (x, p, c + c), r"its length was 1"),
    "not a tensor": (lambda x, p, c: (3, p, c), r"its type was Tensor"),
}


@pytest.mark.parametrize("case", BROKEN_CALLS)
def test_a_call_of_another_kind_is_an_error_not_a_read(case: str) -> None:
    compiled, _ = compiled_tower("eager")
    x, positions, caches = tower_inputs(5)
    compiled(x, positions, caches)
    change, message = BROKEN_CALLS[case]
    with pytest.raises(InputContractError, match=message):
        compiled(*change(x, positions, caches))


def test_another_constant_is_an_error() -> None:
    compiled, _ = compiled_tower("eager")
    compiled(*tower_inputs(5))
    with pytest.raises(InputContractError, match="scale.*its value was 2.0"):
        compiled(*tower_inputs(5), scale=3.0)


def test_misaligned_data_is_an_error() -> None:
    compiled = onegraph.compile(lambda x: x + 1, dynamic_shapes=X, config={"backend": "eager"})
    compiled(torch.zeros(3))
    raw = torch.zeros(64, dtype=torch.uint8)
    misaligned = torch.frombuffer(raw.numpy(), dtype=torch.float32, offset=1, count=4)
    with pytest.raises(InputContractError, match="alignment"):
        compiled(misaligned)


def test_a_needed_gradient_is_a_config_error() -> None:
    compiled = onegraph.compile(lambda x: x * 2, dynamic_shapes=X, config={"backend": "eager"})
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ConfigError, match="inference only"):
        compiled(x)
    with torch.no_grad():
        assert torch.equal(compiled(x), torch.full((3,), 2.0))


@dataclass
class Batch:
    ids: torch.Tensor
    note: str


Pair = namedtuple("Pair", ["left", "right"])


def test_nested_inputs_carry_dynamic_dims() -> None:
    def model(batch: Batch, pair: Pair, extra: dict[str, Any], *more: Any, flag: bool, **rest: Any) -> Any:
        total = batch.ids + pair.left + extra["a"][0] + more[0] + rest["tail"]
        return BaseModelOutput(last_hidden_state=total if flag else pair.right)

    def call(size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = torch.arange(size, dtype=torch.float32)
        args = (Batch(x, "n"), Pair(x, torch.zeros(2)), {"a": [x]}, x)
        return args, {"flag": True, "tail": x}

    shapes = {
        "batch": {"ids": {0: NUM_TOKENS}},
        "pair": ({0: NUM_TOKENS}, None),
        "extra": {"a": [{0: NUM_TOKENS}]},
        "more": ({0: NUM_TOKENS},),
        "tail": {0: NUM_TOKENS},
    }
    compiled = onegraph.compile(model, dynamic_shapes=shapes, config={"backend": "eager"})
    for size in (4, 1, 64):
        args, kwargs = call(size)
        out = compiled(*args, **kwargs)
        assert type(out) is BaseModelOutput
        assert torch.equal(out.last_hidden_state, 5 * torch.arange(size, dtype=torch.float32))
    args, kwargs = call(4)
    with pytest.raises(InputContractError, match=r"tail"):
        compiled(*args, **{**kwargs, "tail": torch.zeros(5)})


def test_two_dims_are_kept_apart() -> None:
    rows, columns = Dim("rows", min=1, max=16), Dim("columns", min=1, max=16)
    compiled = onegraph.compile(
        lambda a, b: a @ b,
        dynamic_shapes={"a": {0: rows, 1: columns}, "b": {0: columns, 1: rows}},
        config={"backend": "inductor"},
    )
    for n, m in ((3, 4), (1, 7), (16, 1), (5, 5)):
        a, b = torch.randn(n, m), torch.randn(m, n)
        torch.testing.assert_close(compiled(a, b), a @ b)
    with pytest.raises(InputContractError, match="columns"):
        compiled(torch.zeros(3, 4), torch.zeros(5, 3))


def branch(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] % 16 == 0:
        return x * 2
    return x + 1


def table(x: torch.Tensor) -> torch.Tensor:
    return x * [1.0, 2.0, 3.0][x.shape[0]]


def divisible(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 4, 4).sum(1)


def specialised(x: torch.Tensor) -> torch.Tensor:
    return x + torch.zeros(7, 8)


def checked(x: torch.Tensor) -> torch.Tensor:
    torch._check(x.shape[0] < 40)
    return x + 1


@pytest.mark.parametrize(
    ("model", "condition"),
    [
        (branch, r"num_tokens % 16 == 0"),
        (table, r"num_tokens"),
        (divisible, r"% 16 == 0"),
        (specialised, r"num_tokens == 7"),
        (checked, r"num_tokens < 40"),
    ],
)
def test_a_model_that_narrows_its_range_is_a_constraint_error(model: Any, condition: str) -> None:
    compiled = onegraph.compile(model, dynamic_shapes=X, config={"backend": "eager"})
    with pytest.raises(ConstraintError, match=condition) as caught:
        compiled(torch.zeros(7, 8))
    assert caught.value.constraints
    assert "test_compile.py:" in str(caught.value), "the user's own line is told"


def test_a_branch_error_quotes_the_users_line() -> None:
    compiled = onegraph.compile(branch, dynamic_shapes=X, config={"backend": "eager"})
    with pytest.raises(ConstraintError, match=r"test_compile\.py:\d+: if x\.shape\[0\] % 16 == 0:"):
        compiled(torch.zeros(7, 8))


def test_what_inductor_assumes_is_judged_too() -> None:
    """A bound that only a piece's compile adds must be found: here by a range that it can't satisfy."""
    import sympy

    from onegraph.capture.constraints import judge, refuse_narrowing
    from onegraph.ir.dims import DynamicDim
    from onegraph.torch_compat.shapes import RawCondition

    symbol = sympy.Symbol("u0", integer=True)
    dims = (DynamicDim("num_tokens", 1, 8192, ("x[0]",)),)
    entries = judge([RawCondition(symbol <= 4096, None, "lowering.py:1")], dims, {"u0": "num_tokens"}, "compile")
    assert [(e.expr, e.effect) for e in entries] == [("num_tokens <= 4096", "narrows")]
    with pytest.raises(ConstraintError, match="num_tokens <= 4096"):
        refuse_narrowing(entries, dims)


def test_a_condition_that_always_holds_is_proven() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] < 65 else x

    compiled = onegraph.compile(model, dynamic_shapes=X, config={"backend": "eager"})
    assert torch.equal(compiled(torch.ones(64)), torch.full((64,), 2.0))


def test_a_graph_break_names_the_users_line_and_torchs_hint() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        print("tracing")
        return x + 1

    compiled = onegraph.compile(model, dynamic_shapes=X)
    with pytest.raises(CaptureError) as caught:
        compiled(torch.zeros(3))
    text = str(caught.value)
    assert "print" in text and "test_compile.py:" in text and 'print("tracing")' in text and "\n" in text


def test_a_failed_build_leaves_the_model_usable_for_another_try() -> None:
    compiled = onegraph.compile(branch, dynamic_shapes=X, config={"backend": "eager"})
    for _ in range(2):
        with pytest.raises(ConstraintError):
            compiled(torch.zeros(7, 8))


def test_assigning_a_global_is_refused() -> None:
    namespace: dict[str, Any] = {}
    exec("def model(x):\n    global counter\n    counter = 3\n    return x + 1\n", namespace)
    with pytest.raises(CaptureError, match="counter"):
        onegraph.compile(namespace["model"], dynamic_shapes=X)(torch.zeros(3))


def test_a_replaced_weight_is_used_and_one_of_another_kind_is_captured_once_more() -> None:
    module = nn.Linear(4, 4, bias=False)
    compiled = onegraph.compile(module, dynamic_shapes={"input": {0: NUM_TOKENS}}, config={"backend": "inductor"})
    x = torch.randn(3, 4)
    compiled(x)
    module.weight = nn.Parameter(torch.eye(4) * 3)
    torch.testing.assert_close(compiled(x), x * 3)
    module.load_state_dict({"weight": torch.eye(4)})
    torch.testing.assert_close(compiled(x), x)
    module.weight = nn.Parameter(torch.eye(4, dtype=torch.float64))
    with counters.expect(recaptures=1):
        torch.testing.assert_close(compiled(x.double()), x.double())


def test_a_replaced_weight_of_another_kind_is_refused_where_state_is_frozen() -> None:
    module = nn.Linear(4, 4, bias=False)
    compiled = onegraph.compile(module, config={"backend": "eager", "freeze": True})
    compiled(torch.ones(3, 4))
    module.weight = nn.Parameter(torch.eye(4, dtype=torch.float64))
    with pytest.raises(InputContractError, match="weight was replaced"):
        compiled(torch.ones(3, 4))


def test_a_reassigned_buffer_is_read_anew_on_each_call() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total = self.total + x.sum(0)
            return self.total * 1

    module = Running()
    compiled = onegraph.compile(module, dynamic_shapes=X, config={"backend": "inductor"})
    for step in range(1, 4):
        assert torch.equal(compiled(torch.ones(step, 4)), module.total)
    assert torch.equal(module.total, torch.full((4,), 6.0))


def test_closure_tensors_of_functions_are_inputs() -> None:
    table_ = torch.arange(4.0)

    def model(x: torch.Tensor) -> torch.Tensor:
        return x + table_

    compiled = onegraph.compile(model, dynamic_shapes=X, config={"backend": "inductor"})
    assert torch.equal(compiled(torch.zeros(2, 4))[0], table_)
    table_.mul_(2)
    assert torch.equal(compiled(torch.zeros(2, 4))[0], table_)


def test_methods_hooks_and_tied_weights() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    module.register_forward_hook(lambda m, args, out: out + 1)
    compiled = onegraph.compile(module, dynamic_shapes={"input": {0: NUM_TOKENS}}, config={"backend": "eager"})
    x = torch.randn(5, 4)
    torch.testing.assert_close(compiled(x), module(x).detach())
    method = onegraph.compile(module[0].forward, dynamic_shapes={"input": {0: NUM_TOKENS}}, config={"backend": "eager"})
    torch.testing.assert_close(method(x), module[0](x).detach())


class AddOne(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return x + 1 if y is None else x + y


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "pre-hook that takes all": lambda m: m.register_forward_pre_hook(lambda m, args: tuple(a * 2 for a in args)),
    "pre-hook that takes the first": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:])),
    "hook that counts": lambda m: m.register_forward_hook(lambda m, args, out: out * len(args)),
    "pre-hook with keywords": lambda m: m.register_forward_pre_hook(
        lambda m, args, kwargs: (args, {name: value * 3 for name, value in kwargs.items()}), with_kwargs=True
    ),
    "hook with keywords": lambda m: m.register_forward_hook(
        lambda m, args, kwargs, out: out * (len(args) + 3 * len(kwargs)), with_kwargs=True
    ),
}
CALLS: dict[str, Callable[[Callable[..., torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "one": lambda f, x: f(x),
    "two": lambda f, x: f(x, x * 2),
    "one by name": lambda f, x: f(x, y=x * 2),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_see_the_arguments_as_they_were_given(hook: str, call: str) -> None:
    module = AddOne()
    HOOKS[hook](module)
    compiled = onegraph.compile(module, dynamic_shapes={"x": {0: NUM_TOKENS}}, config={"backend": "eager"})
    if call != "one":
        compiled = onegraph.compile(
            module, dynamic_shapes={"x": {0: NUM_TOKENS}, "y": {0: NUM_TOKENS}}, config={"backend": "eager"}
        )
    for size in (3, 5):
        x = torch.randn(size, 4)
        assert torch.equal(CALLS[call](compiled, x), CALLS[call](module, x))


def test_other_arguments_by_name_than_the_hooks_saw_are_refused() -> None:
    module = AddOne()
    module.register_forward_hook(lambda m, args, out: out * len(args))
    compiled = onegraph.compile(module, dynamic_shapes={"x": {0: NUM_TOKENS}}, config={"backend": "eager"})
    compiled(torch.ones(3, 4))
    with pytest.raises(InputContractError, match="the positional arguments broke the input contract: its length"):
        compiled(x=torch.ones(3, 4))


def tagged() -> torch.Tensor:
    x = torch.ones(3, 4)
    x.tag = 1  # type: ignore[attr-defined]
    return x


def with_grad() -> torch.Tensor:
    x = torch.ones(3, 4)
    x.grad = torch.ones(3, 4)
    return x


def product() -> torch.Tensor:
    with torch.enable_grad():
        return torch.ones(3, 4, requires_grad=True) * 1


TENSOR_QUESTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[], torch.Tensor]]] = {
    "isinstance Parameter": (lambda x: isinstance(x, nn.Parameter), lambda: nn.Parameter(torch.ones(3, 4))),
    "type": (lambda x: type(x) is not torch.Tensor, lambda: nn.Parameter(torch.ones(3, 4))),
    "__class__": (lambda x: x.__class__ is not torch.Tensor, lambda: nn.Parameter(torch.ones(3, 4))),
    "requires_grad": (lambda x: x.requires_grad, lambda: torch.ones(3, 4, requires_grad=True)),
    "is_leaf": (lambda x: not x.is_leaf, product),
    "grad_fn": (lambda x: x.grad_fn is not None, product),
    "grad": (lambda x: x.grad is not None, with_grad),
    "hasattr": (lambda x: hasattr(x, "tag"), tagged),
}


@pytest.mark.parametrize("case", TENSOR_QUESTIONS)
def test_what_a_trace_asks_of_a_tensor_belongs_to_the_input_contract(case: str) -> None:
    ask, make_other = TENSOR_QUESTIONS[case]
    plain, other = torch.ones(3, 4), make_other()
    with torch.no_grad():
        compiled = onegraph.compile(lambda x: x * 2 if ask(x) else x * 3, config={"backend": "eager"})
        assert torch.equal(compiled(plain), plain * 3)
        assert torch.equal(compiled(plain), plain * 3)
        with pytest.raises(InputContractError, match=r"^\[OG-INPUT\] x.* when the module was captured"):
            compiled(other)
        with pytest.raises(CaptureError, match="the module asks about x"):
            onegraph.compile(lambda x: x * 2 if ask(x) else x * 3, config={"backend": "eager"})(other)


@dataclass
class Ids:
    ids: torch.Tensor
    factor = 2.0

    def __post_init__(self) -> None:
        self.extra = 2.0

    def scaled(self) -> torch.Tensor:
        return self.ids * 3


class IdsAndSize(namedtuple("IdsAndSize", ["ids", "size"])):
    factor = 2.0


def test_an_attribute_that_is_no_field_belongs_to_the_input_contract() -> None:
    x = torch.ones(3, 4)
    batch = Ids(x)
    batch.extra = 5.0
    compiled = onegraph.compile(lambda x, b: x * b.extra + b.ids, config={"backend": "eager"})
    assert torch.equal(compiled(x, Ids(x)), x * 3)
    with pytest.raises(InputContractError, match=r"b\.extra .* it was 2.0 .* and now is 5.0"):
        compiled(x, batch)
    del batch.extra
    with pytest.raises(InputContractError, match=r"b\.extra .* it was 2.0 .* and now"):
        compiled(x, batch)


def test_an_attribute_that_was_absent_belongs_to_the_input_contract() -> None:
    x, batch = torch.ones(3, 4), Ids(torch.ones(3, 4))
    compiled = onegraph.compile(lambda x, b: x * 2 if hasattr(b, "late") else x * 3, config={"backend": "eager"})
    assert torch.equal(compiled(x, batch), x * 3)
    batch.late = 1  # type: ignore[attr-defined]
    with pytest.raises(InputContractError, match="without late .* and now is with late"):
        compiled(x, batch)


@pytest.mark.parametrize(
    ("kind", "name", "changed"),
    [(Ids, "factor", 7.0), (Ids, "scaled", lambda self: self.ids * 100), (IdsAndSize, "factor", 7.0)],
)
def test_a_changed_class_of_an_argument_is_captured_once_more(
    kind: Any, name: str, changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(x: torch.Tensor, b: Any) -> Any:
        return x * getattr(b, name)() if name == "scaled" else x * getattr(b, name)

    x = torch.ones(3, 4)
    batch = Ids(x) if kind is Ids else IdsAndSize(x, 1)
    compiled = onegraph.compile(model, config={"backend": "eager"})
    assert torch.equal(compiled(x, batch), model(x, batch))
    monkeypatch.setattr(kind, name, changed)
    with counters.expect(recaptures=1):
        assert torch.equal(compiled(x, batch), model(x, batch))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize(
    "other",
    [
        lambda x: torch.nested.nested_tensor([x[0], x[0], x[0]]),
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
    ],
    ids=["nested", "sparse", "sparse csr"],
)
@pytest.mark.parametrize("dynamic_shapes", [None, X], ids=["static", "dynamic"])
def test_a_tensor_of_another_layout_is_refused(other: Any, dynamic_shapes: Any) -> None:
    """C++ ended the process at the nested one, which has neither sizes nor strides."""
    compiled = onegraph.compile(lambda x: x * 2, dynamic_shapes=dynamic_shapes, config={"backend": "eager"})
    x = torch.ones(3, 4)
    compiled(x)
    with pytest.raises(InputContractError, match="its layout was torch.strided"):
        compiled(other(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_at_capture() -> None:
    with pytest.raises(CaptureError, match="x is a nested tensor"):
        onegraph.compile(lambda x: x * 2)(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))


def test_a_tensor_given_twice_stays_one() -> None:
    def model(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.add_(1)
        return a + b

    compiled = onegraph.compile(model, dynamic_shapes={"a": {0: NUM_TOKENS}, "b": {0: NUM_TOKENS}})
    x = torch.zeros(3)
    assert torch.equal(compiled(x, x), torch.full((3,), 2.0))


def test_outputs_that_alias_each_other_are_right() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 2
        return y, y.view(-1)

    compiled = onegraph.compile(model, dynamic_shapes=X, config={"backend": "inductor"})
    y, flat = compiled(torch.ones(3, 2))
    y.add_(1)
    assert torch.equal(flat, torch.full((6,), 3.0)), "the view shares memory with its base, as in eager"


def test_warm_up_compiles_without_running_the_module() -> None:
    compiled, _ = compiled_tower("inductor")
    x, positions, caches = tower_inputs(3)
    compiled.warm_up({"x": x, "positions": positions, "caches": caches})
    assert compiled.original.calls.item() == 0 and caches[0].abs().sum() == 0
    with counters.expect(dynamo_compiles=0, inductor_compiles=0):
        compiled(*tower_inputs(9))


def test_the_callers_tensors_are_not_marked() -> None:
    x = torch.zeros(3)
    onegraph.compile(lambda x: x + 1, dynamic_shapes=X, config={"backend": "eager"})(x)
    assert not [name for name in vars(x) if "dynamo" in name]


def test_instances_and_threads_live_side_by_side() -> None:
    modules = [nn.Linear(4, 4) for _ in range(4)]
    compiled = [onegraph.compile(m, dynamic_shapes={"input": {0: NUM_TOKENS}}) for m in modules]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for size in (3, 1, 64):
                x = torch.randn(size, 4)
                torch.testing.assert_close(compiled[index](x), modules[index](x).detach())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index % 4,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_compiled_model_can_be_freed() -> None:
    module = nn.Linear(4, 4)
    compiled = onegraph.compile(module, dynamic_shapes={"input": {0: NUM_TOKENS}}, config={"backend": "inductor"})
    compiled(torch.zeros(3, 4))
    gone = weakref.ref(module)
    del module, compiled
    gc.collect()
    assert gone() is None


def test_inference_mode_and_dynamic_dims_without_names() -> None:
    compiled = onegraph.compile(
        lambda x: x.relu(),
        dynamic_shapes={"x": {0: Dim.DYNAMIC, 1: Dim.STATIC}},
        config={"max_num_tokens": 16},
    )
    with torch.inference_mode():
        assert torch.equal(compiled(torch.ones(3, 2)), torch.ones(3, 2))
        assert compiled(torch.ones(16, 2)).shape == (16, 2)
        with pytest.raises(ShapeOutOfRangeError, match=r"0\.\.16"):
            compiled(torch.ones(17, 2))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"y": {0: NUM_TOKENS}}, "'y', which is no argument"),
        ({"x": {5: NUM_TOKENS}}, "names dim 5 of x"),
        ({"x": {0: 2 * NUM_TOKENS}}, "derived"),
        ({"x": {0: "num_tokens"}}, "no Dim"),
        ({"x": {"a": NUM_TOKENS}}, "dims are numbered"),
        ({"x": NUM_TOKENS}, "for the tensor x"),
        ("x", "not a dict"),
    ],
)
def test_dynamic_shapes_that_dont_fit_are_config_errors(shapes: Any, message: str) -> None:
    compiled = onegraph.compile(lambda x: x + 1, dynamic_shapes=shapes, config={"backend": "eager"})
    with pytest.raises(ConfigError, match=message):
        compiled(torch.zeros(3, 2))


def test_one_name_with_two_ranges_is_refused() -> None:
    shapes = {"a": {0: Dim("n", max=4)}, "b": {0: Dim("n", max=8)}}
    with pytest.raises(ConfigError, match="n is declared as"):
        onegraph.compile(lambda a, b: a + b, dynamic_shapes=shapes)(torch.zeros(3), torch.zeros(3))


def test_eager_pieces_runs_the_piece_uncompiled() -> None:
    compiled = onegraph.compile(lambda x: x + 1, dynamic_shapes=X, config={"eager_pieces": [0]})
    with counters.expect(graphs_captured=1, inductor_compiles=0):
        compiled(torch.zeros(3))
    piece = compiled.explain().to_dict()["pieces"][0]
    assert piece["backend"] == "eager" and "eager_pieces" in piece["ranges"][0]["why"]


def test_inductor_options_reach_inductor_and_the_key(fresh_cache: Any) -> None:
    keys = set()
    for options in ({}, {"size_asserts": False}):
        compiled = onegraph.compile(lambda x: x + 1, dynamic_shapes=X, config={"inductor_compile_config": options})
        with counters.expect(inductor_compiles=1):
            compiled(torch.zeros(3))
        keys.add(compiled.explain().to_dict()["pieces"][0]["ranges"][0]["key"])
    assert len(keys) == 2


def test_an_inductor_option_that_doesnt_exist_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="max_autotune"):
        onegraph.compile(lambda x: x + 1, config={"inductor_compile_config": {"max_autotunes": True}})


def test_explain_before_and_after() -> None:
    compiled, _ = compiled_tower("inductor")
    before = compiled.explain().to_dict()
    assert before["pieces"] == [] and before["config"]["backend"]["value"] == "inductor"
    compiled(*tower_inputs(3))
    facts = compiled.explain().to_dict()
    assert [stage["name"] for stage in facts["stages"]] == [
        "index",
        "capture",
        "split",
        "passes",
        "compile or load",
        "plan",
        "bind",
    ]
    assert facts["dims"] == [{"name": "num_tokens", "min": 1, "max": 64, "inputs": ["x[0]", "positions[0]"]}]
    assert facts["pieces"][0]["ranges"][0]["store"] in ("hit", "miss")
    assert facts["ledger"]["inputs"] and facts["ledger"]["state"]
    assert "num_tokens = 1..64" in str(compiled.explain())


def test_copying_a_compiled_model_says_what_to_do() -> None:
    compiled, _ = compiled_tower("eager")
    with pytest.raises(ConfigError, match="can't be pickled"):
        copy.deepcopy(compiled)


def test_one_thread_has_kernels_without_parallel_regions() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compiled = onegraph.compile(lambda x: x * 3 - 1, dynamic_shapes=X, config={"backend": "inductor"})
        assert torch.equal(compiled(torch.ones(5)), torch.full((5,), 2.0))
    finally:
        torch.set_num_threads(threads)


class Mode(enum.Enum):
    DOUBLE = 2
    TRIPLE = 3


class Holder:
    def __init__(self, factor: int) -> None:
        self.factor = factor


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (Mode.DOUBLE, Mode.TRIPLE),
        (torch.Size([2]), torch.Size([3])),
        (slice(0, 1), slice(1, 2)),
        (torch.neg, torch.abs),
        (Holder(2), Holder(3)),
        (OrderedDict(a=torch.ones(2)), OrderedDict(a=torch.ones(2, dtype=torch.float64))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_argument_that_is_no_tensor_has_to_stay_what_it_was(first: Any, later: Any) -> None:
    compiled = onegraph.compile(lambda x, other: x * 2, dynamic_shapes=X, config={"backend": "eager"})
    compiled(torch.ones(3), first)
    compiled(torch.ones(4), first)
    with pytest.raises(InputContractError, match="other broke the input contract"):
        compiled(torch.ones(3), later)


def test_a_tensor_that_was_given_twice_has_to_be_given_twice() -> None:
    """Residual code takes both from the first: another tensor in the second place wouldn't be seen."""
    compiled = onegraph.compile(lambda a, b: a * 2 + b, config={"backend": "eager"})
    x = torch.ones(3)
    compiled(x, x)
    with pytest.raises(InputContractError, match="a itself"):
        compiled(x, torch.zeros(3))


@pytest.mark.parametrize("as_keys", [False, True])
def test_tensors_that_were_compared_have_to_stay_different(as_keys: bool) -> None:
    def compares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * len({a, b}) if as_keys else a * 5 if a is b else a + b

    compiled = onegraph.compile(compares, config={"backend": "eager"})
    a, b = torch.ones(3), torch.full((3,), 2.0)
    torch.testing.assert_close(compiled(a, b), compares(a, b))
    with pytest.raises(InputContractError, match="it was another than b when the module was captured"):
        compiled(a, a)

    sums = onegraph.compile(lambda a, b: a + b, config={"backend": "eager"})
    torch.testing.assert_close(sums(a, b), a + b)
    torch.testing.assert_close(sums(a, a), a + a)


@pytest.mark.parametrize("same_first", [True, False], ids=["same first", "other first"])
def test_a_list_that_is_given_twice_is_one_list(same_first: bool) -> None:
    def grows(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
        left.append(left[0] * 2)
        right.append(right[-1] * 3)
        return right[-1] + len(left)

    def lists(same: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        one = [torch.ones(3)]
        return (one, one) if same else (one, [torch.ones(3)])

    compiled = onegraph.compile(grows, config={"backend": "eager"})
    given, expected = lists(same_first), lists(same_first)
    torch.testing.assert_close(compiled(*given), grows(*expected))
    torch.testing.assert_close(given, expected)
    with pytest.raises(InputContractError, match="right broke the input contract: it was"):
        compiled(*lists(not same_first))


def test_parameters_may_have_the_names_of_builtins() -> None:
    def model(x: Any, type: int, len: int, list: int, isinstance: int) -> Any:  # noqa: A002 - on purpose
        return x[0] * type * len

    compiled = onegraph.compile(model, config={"backend": "eager"})
    for _ in range(2):
        assert torch.equal(compiled([torch.ones(2)], 2, 3, 4, 5), torch.full((2,), 6.0))


@pytest.mark.parametrize("first", [False, True])
def test_another_autocast_mode_is_an_error(first: bool) -> None:
    compiled = onegraph.compile(nn.Linear(4, 4), config={"backend": "eager"})
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
        compiled(torch.ones(2, 4))
    with pytest.raises(InputContractError, match="autocast"), torch.autocast("cpu", enabled=not first):
        compiled(torch.ones(2, 4))


def test_a_module_moved_to_another_dtype_is_captured_once_more() -> None:
    """`module.to(dtype)` keeps each Parameter and changes its data: kernels would read it as the old dtype."""
    module = nn.LayerNorm(8)
    compiled = onegraph.compile(module, dynamic_shapes={"input": {0: NUM_TOKENS}}, config={"backend": "inductor"})
    compiled(torch.ones(2, 8))
    module.to(torch.bfloat16)
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    torch.testing.assert_close(compiled(x), module(x))


RESIZED = torch.ones(4)
KEPT_KIND = nn.Linear(4, 4, bias=False)
CHANGED_IN_PLACE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[], object]]] = {
    "data of another shape": (
        lambda x: x * KEPT_KIND.weight.shape[0] + KEPT_KIND.weight.sum(),
        lambda: setattr(KEPT_KIND.weight, "data", torch.ones(8, 4)),
    ),
    "data of another layout": (
        lambda x: x * KEPT_KIND.weight.stride(0) + KEPT_KIND.weight.sum(),
        lambda: setattr(KEPT_KIND.weight, "data", torch.ones(4, 4).t()[:, 1:]),
    ),
    "shape alone": (
        lambda x: x * KEPT_KIND.weight.shape[0],
        lambda: setattr(KEPT_KIND.weight, "data", torch.ones(6, 4)),
    ),
    "resized global": (lambda x: x.sum() + torch.zeros(RESIZED.shape[0]), lambda: RESIZED.resize_(6)),
}


@pytest.mark.parametrize("case", CHANGED_IN_PLACE)
def test_a_weight_that_is_changed_to_another_kind_in_place_is_captured_once_more(case: str) -> None:
    model, change = CHANGED_IN_PLACE[case]
    KEPT_KIND.weight.data = torch.ones(4, 4)
    compiled = onegraph.compile(model, dynamic_shapes=X, config={"backend": "eager"})
    x = torch.ones(2, 4)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        change()
        with counters.expect(recaptures=1):
            assert torch.equal(compiled(x), model(x))
        with counters.expect(recaptures=0):
            compiled(x)


def test_a_weight_that_is_changed_to_another_shape_in_place_is_refused_where_state_is_frozen() -> None:
    module = nn.Linear(4, 4, bias=False)
    compiled = onegraph.compile(module, config={"backend": "eager", "freeze": True})
    compiled(torch.ones(3, 4))
    module.weight.data = torch.zeros(8, 4)
    with pytest.raises(InputContractError, match="weight was replaced"):
        compiled(torch.ones(3, 4))


GLOBAL_LINEAR = nn.Linear(4, 4, bias=False)


def test_a_weight_of_a_global_module_is_read_anew_on_each_call() -> None:
    compiled = onegraph.compile(lambda x: GLOBAL_LINEAR(x), dynamic_shapes=X, config={"backend": "eager"})
    compiled(torch.ones(2, 4))
    GLOBAL_LINEAR.weight = nn.Parameter(torch.eye(4) * 3)
    assert torch.equal(compiled(torch.ones(2, 4)), torch.full((2, 4), 3.0))


def test_a_view_as_another_dtype_keeps_its_dtype_and_memory() -> None:
    compiled = onegraph.compile(lambda x: (x.view(torch.int32), x + 1), dynamic_shapes=X)
    x = torch.ones(3)
    view, _ = compiled(x)
    assert torch.equal(view, x.view(torch.int32))
    view.zero_()
    assert torch.equal(x, torch.zeros(3))


def test_a_piece_that_cant_be_stored_runs_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.add_(1)
        return a - b * 3

    monkeypatch.setattr(torch_inductor, "_why_not_portable", lambda *args: "it needs this process")
    compiled = onegraph.compile(model, config={"backend": "inductor"})
    for _ in range(2):
        given, as_eager = torch.ones(4), torch.ones(4)
        assert torch.equal(compiled(given, torch.ones(4)), model(as_eager, torch.ones(4)))
        assert torch.equal(given, as_eager)
    (piece,) = compiled.explain().pieces
    assert (piece.ranges[0].store, piece.ranges[0].why) == ("off", "can't be stored: it needs this process")


def test_a_narrowed_dim_is_found_whatever_the_dims_are_called() -> None:
    """Two conditions never become one text, even where a dim has the name that another one has inside."""

    def model(x: torch.Tensor, y: torch.Tensor) -> Any:
        torch._check(x.shape[0] <= 50)
        torch._check(y.shape[0] <= 50)
        return x + 1, y + 1

    shapes = {"x": {0: Dim("dim1", min=1, max=4)}, "y": {0: Dim("dim0", min=1, max=100)}}
    with pytest.raises(ConstraintError, match="dim0 <= 50"):
        onegraph.compile(model, dynamic_shapes=shapes, config={"backend": "eager"})(torch.ones(3), torch.ones(5))


OVERLAPS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "apart": lambda base: (base[:4].clone(), base[4:8]),
    "side by side": lambda base: (base[:4], base[4:8]),
    "side by side, elsewhere": lambda base: (base[8:12], base[4:8]),
    "two views of the same": lambda base: (base[:4], base[:4]),
    "shifted": lambda base: (base[:4], base[1:5]),
    "shifted back": lambda base: (base[2:6], base[:4]),
    "interleaved": lambda base: (base[:8:2], base[1:9:2]),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("first", OVERLAPS)
def test_inputs_that_overlap_are_right_or_refused_where_one_is_changed(first: str, backend: str) -> None:
    def model(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.mul_(2)
        return a + b

    compiled = onegraph.compile(model, config={"backend": backend})
    for name in (first, *OVERLAPS):
        given, expected = torch.arange(12.0), torch.arange(12.0)
        if not name.startswith(("apart", "side")):
            with pytest.raises(InputContractError, match="share memory|strides"):
                compiled(*OVERLAPS[name](given))
            assert torch.equal(given, expected), "refused before anything was changed"
        else:
            result = compiled(*OVERLAPS[name](given))
            assert torch.equal(result, model(*OVERLAPS[name](expected)))
            assert torch.equal(given, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_an_input_that_overlaps_a_weight_is_refused_where_one_is_changed(backend: str) -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(1)
            return x * 2

    module = Adding()
    compiled = onegraph.compile(module, config={"backend": backend})
    assert torch.equal(compiled(torch.ones(4)), torch.full((4,), 2.0))
    with pytest.raises(InputContractError, match="x and total share memory"):
        compiled(module.total[:])
    assert torch.equal(module.total, torch.ones(4))


def test_layers_of_one_cache_are_written_and_the_artifact_is_kept() -> None:
    def step(x: torch.Tensor, slots: torch.Tensor, caches: list[torch.Tensor]) -> torch.Tensor:
        for cache in caches:
            cache.index_copy_(0, slots, x)
            x = x + cache[:2].sum(0)
        return x

    dims = {"x": {0: NUM_TOKENS}, "slots": {0: NUM_TOKENS}, "caches": None}
    for store in ("miss", "hit"):
        compiled = onegraph.compile(step, dynamic_shapes=dims)
        given, expected = list(torch.zeros(3, 32, 8).unbind(0)), list(torch.zeros(3, 32, 8).unbind(0))
        x, slots = torch.randn(3, 8), torch.tensor([0, 5, 7])
        torch.testing.assert_close(compiled(x, slots, given), step(x, slots, expected))
        torch.testing.assert_close(given, expected)
        assert compiled.explain().pieces[0].ranges[0].store == store


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.seen: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x + self.count


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_counter_counts_on(backend: str) -> None:
    module, eager = Stateful(), Stateful()
    compiled = onegraph.compile(module, dynamic_shapes=X, config={"backend": backend})
    with counters.expect(recaptures=0):
        for size in (2, 3, 5):
            assert torch.equal(compiled(torch.ones(size)), eager(torch.ones(size)))
            assert module.count == eager.count and type(module.count) is int
        module.count = eager.count = 40
        assert torch.equal(compiled(torch.ones(2)), eager(torch.ones(2)))


class Deciding(Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x + 1 if self.count > 2 else x + 2


class Collecting(Stateful):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return x + 1


@pytest.mark.parametrize(("kind", "state"), [(Deciding, "'count'"), (Collecting, "'seen'")])
def test_python_state_that_is_read_and_changed_is_kept_or_refused_where_nothing_compares_it(
    kind: Any, state: str
) -> None:
    module, eager = kind(), kind()
    compiled = onegraph.compile(module, config={"backend": "eager"})
    for count in range(1, 12):
        assert torch.equal(compiled(torch.ones(2)), eager(torch.ones(2)))
        assert module.count == eager.count and len(module.seen) == len(eager.seen), count
    for unchecked in ({"config": {"backend": "eager", "freeze": True}}, {"own_module": True}):
        with pytest.raises(CaptureError, match=f"reads and changes Python state.*{state}"):
            onegraph.compile(kind(), **{"config": {"backend": "eager"}, **unchecked})(torch.ones(2))


def test_the_weights_of_a_compiled_model_can_be_freed() -> None:
    gone = []
    for backend in BACKENDS:
        module = nn.Linear(4, 4)
        gone.append(weakref.ref(module.weight))
        onegraph.compile(module, config={"backend": backend})(torch.ones(2, 4))
        del module
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(BACKENDS)


def test_a_tensor_hidden_in_an_object_is_refused() -> None:
    class Holder:
        tensor = torch.ones(2)

    holder = Holder()
    holder.tensor = torch.ones(2)
    with pytest.raises(CaptureError, match="inside an argument whose type isn't known"):
        onegraph.compile(lambda x, h: x + h.tensor, config={"backend": "eager"})(torch.ones(2), holder)


def test_lazy_bits_are_parts_of_the_contract() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    compiled = onegraph.compile(module, config={"backend": "eager"})
    compiled(torch.ones(3, 2))
    with pytest.raises(InputContractError, match="negative"):
        compiled(torch._neg_view(torch.ones(3, 2)))
