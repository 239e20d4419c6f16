"""Custom ops are checked once, on the first real call's values, without a trace of the check."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.errors import CaptureError, CustomOpError

EAGER = {"backend": "eager"}
TOKENS = Dim("num_tokens", min=1, max=64)
NAMESPACE = "onegraph_test_ops"


@pytest.fixture
def define() -> Iterator[Callable[..., Any]]:
    """Defines an op as a C++ extension would: nothing but this check looks whether schema and fake are true."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")

    def make(schema: str, implementation: Any, fake: Any, key: str = "CompositeExplicitAutograd") -> Any:
        name = schema.split("(", 1)[0]
        library.define(schema)
        library.impl(name, implementation, key)
        if fake is not None:
            torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        return getattr(getattr(torch.ops, NAMESPACE), name)

    yield make
    library._destroy()


def compiled(model: Any, dim: Dim = TOKENS, backend: str = "eager") -> Any:
    return onegraph.compile(model, dynamic_shapes={"x": {0: dim}}, config={"backend": backend})


def states(call: Any) -> dict[str, str]:
    return {op["name"].split("::")[1]: op["check"] for op in call.explain().to_dict()["custom_ops"]}


def change(x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x * 2


WRONG = {
    "changes an argument": (
        "f(Tensor x) -> Tensor",
        change,
        torch.empty_like,
        r"f\.default changes its argument 'x', and its schema doesn't say so",
    ),
    "writes NaN over NaN and more": (
        "f(Tensor x) -> Tensor",
        lambda x: (x.fill_(float("nan")) * 0).clone(),
        torch.empty_like,
        "changes its argument 'x'",
    ),
    "shares memory with an argument": (
        "f(Tensor x) -> Tensor",
        lambda x: x[:],
        torch.empty_like,
        "result 0 of .*f.default shares memory with its argument 'x'",
    ),
    "shares memory by way of numpy": (
        "f(Tensor x) -> Tensor",
        lambda x: torch.from_numpy(x.numpy()),
        torch.empty_like,
        "shares memory with its argument 'x'",
    ),
    "results share memory": (
        "f(Tensor x) -> (Tensor, Tensor)",
        lambda x: (lambda y: (y, y[:]))(x + 1),
        lambda x: (torch.empty_like(x), torch.empty_like(x)),
        "result 1 of .* shares memory with another result",
    ),
    "shape": (
        "f(Tensor x) -> Tensor",
        lambda x: x[:, :2].clone(),
        torch.empty_like,
        r"the shape of result 0 of .*f\.default is \[5, 2\], and its fake says \[5, 4\]",
    ),
    "a dynamic size": (
        "f(Tensor x) -> Tensor",
        lambda x: torch.cat([x, x]),
        torch.empty_like,
        r"the shape of result 0 of .* is \[10, 4\], and its fake says \[5, 4\]",
    ),
    "rank": (
        "f(Tensor x) -> Tensor",
        lambda x: x.sum(1),
        torch.empty_like,
        r"the shape of result 0 of .* is \[5\], and its fake says \[5, 4\]",
    ),
    "strides": (
        "f(Tensor x) -> Tensor",
        lambda x: x.t().contiguous().t(),
        torch.empty_like,
        r"the strides of result 0 of .* is \[1, 5\], and its fake says \[4, 1\]",
    ),
    "dtype": (
        "f(Tensor x) -> Tensor",
        lambda x: x.double(),
        torch.empty_like,
        r"the dtype of result 0 of .* is torch.float64, and its fake says torch.float32",
    ),
    "device": (
        "f(Tensor x) -> Tensor",
        lambda x: x * 2,
        lambda x: torch.empty_like(x, device="meta"),
        r"the device of result 0 of .* is cpu, and its fake says meta",
    ),
    "a number": (
        "f(Tensor x) -> (Tensor, int)",
        lambda x: (x * 2, int(x.sum())),
        lambda x: (torch.empty_like(x), 3),
        r"the value of result 1 of .* is 20, and its fake says 3",
    ),
    "number of results": (
        "f(Tensor x) -> Tensor[]",
        lambda x: [x * 2],
        lambda x: [torch.empty_like(x), torch.empty_like(x)],
        r"gives 1 values, and its fake 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_op_that_does_something_else_than_it_says_is_an_error(case: str, define: Callable[..., Any]) -> None:
    schema, implementation, fake, message = WRONG[case]
    f = define(schema, implementation, fake)

    def model(x: torch.Tensor) -> Any:
        result = f(x + 0)  # the line that is told
        first = result[0] if isinstance(result, list | tuple) else result
        return first.float() + 1 if case != "device" else first + 1

    x = torch.ones(5, 4)
    call = compiled(model)
    for _ in range(2):  # and it stays one
        with pytest.raises(CustomOpError, match=message) as caught:
            call(x)
        assert re.search(r"test_custom_ops\.py:\d+: result = f\(x \+ 0\)  # the line that is told", str(caught.value))
        assert isinstance(caught.value, CaptureError) and caught.value.hint
        assert torch.equal(x, torch.ones(5, 4))
    assert states(call) == {"f": "pending"}


def test_a_true_op_is_checked_once(define: Callable[..., Any]) -> None:
    calls: list[torch.Tensor] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x.t() * 2

    f = define("f(Tensor x) -> Tensor", run, lambda x: torch.empty_like(x.t()))
    call = compiled(lambda x: f(x) + 1)
    x = torch.rand(5, 4)
    assert torch.equal(call(x), x.t() * 2 + 1)
    assert len(calls) == 2 and calls[0].data_ptr() != x.data_ptr() == calls[1].data_ptr()
    assert torch.equal(call(torch.ones(1, 4)), torch.full((4, 1), 3.0)) and len(calls) == 3
    assert states(call) == {"f": "checked"} and "f  checked on the first call's values" in str(call.explain())


def test_warm_up_leaves_it_pending(define: Callable[..., Any]) -> None:
    f = define("f(Tensor x) -> Tensor", change, torch.empty_like)
    call = compiled(lambda x: f(x) + 1)
    call.warm_up({"x": torch.zeros(3, 4)})
    assert states(call) == {"f": "pending"} and "f  pending" in str(call.explain())
    with pytest.raises(CustomOpError, match="changes its argument"):
        call(torch.zeros(2, 4))


def test_meta_tensors_leave_it_pending(define: Callable[..., Any]) -> None:
    f = define("f(Tensor x) -> Tensor", lambda x: x * 2, torch.empty_like)
    from onegraph.capture.custom_ops import checked_at_first_call, custom_ops

    graph_module = torch.fx.symbolic_trace(nn.Identity())
    graph = torch.fx.Graph()
    graph.output((graph.call_function(f.default, (graph.placeholder("x"),)),))
    graph_module = torch.fx.GraphModule(nn.Module(), graph)
    ops = custom_ops(graph_module)
    run = checked_at_first_call(graph_module, graph_module, ops)
    assert run(torch.ones(2, device="meta"))[0].is_meta and not ops[0].checked
    assert run(torch.ones(2))[0].tolist() == [2, 2] and ops[0].checked


class Layers(nn.Module):
    """Weights, a buffer, batch statistics, caches and random numbers around an op that changes what it says."""

    def __init__(self, f: Any) -> None:
        super().__init__()
        self.f = f
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(1))
        self.calls: torch.Tensor

    def forward(self, x: torch.Tensor, caches: list[torch.Tensor]) -> torch.Tensor:
        self.calls.add_(1)
        for cache in caches:
            x = self.norm(self.linear(x)) + torch.rand(4)
            self.f(x, cache[1:])
            cache[0].mul_(2)
        self.linear.bias.add_(1)
        return self.f(x, caches[0][1:]) + self.calls + cache.sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_check_leaves_no_trace(backend: str, define: Callable[..., Any]) -> None:
    def write(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache.add_(x.sum())
        return x.clone()

    f = define("f(Tensor x, Tensor(a!) cache) -> Tensor", write, lambda x, cache: torch.empty_like(x))
    results = []
    for wrap in (lambda module: module, lambda module: compiled(module, Dim("n", min=2, max=64), backend)):
        torch.manual_seed(0)
        module = Layers(f)
        call, x = wrap(module), torch.randn(5, 4)
        caches = [torch.ones(3, 4) for _ in range(3)]
        with torch.no_grad():
            out = call(x, caches)
        results.append([out, *caches, *module.parameters(), *module.buffers(), torch.get_rng_state()])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_check_sees_the_values_that_the_call_sees(define: Callable[..., Any]) -> None:
    seen: list[float] = []

    def run_fill(cache: torch.Tensor) -> None:
        cache.fill_(7)

    def run_read(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        seen.append(cache.sum().item())
        return x + cache.sum()

    fill = define("fill(Tensor(a!) cache) -> ()", run_fill, lambda cache: None)
    read = define("read(Tensor x, Tensor cache) -> Tensor", run_read, lambda x, cache: torch.empty_like(x))

    def model(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        fill(cache[0])
        return read(x, cache)

    compiled(model)(torch.ones(5, 4), torch.ones(2, 2))
    assert seen == [16, 16]


def test_weights_are_not_given_to_an_op_that_changes_them(define: Callable[..., Any]) -> None:
    f = define("f(Tensor w) -> Tensor", change, torch.empty_like)
    module = nn.Linear(4, 4)
    before = module.weight.detach().clone()

    def model(x: torch.Tensor) -> torch.Tensor:
        return x @ f(module.weight[1:]).t()

    with pytest.raises(CustomOpError, match="changes its argument 'w'"), torch.no_grad():
        compiled(model)(torch.ones(5, 4))
    assert torch.equal(module.weight, before)


def test_declared_changes_and_views_are_fine(define: Callable[..., Any]) -> None:
    def run_add(x: torch.Tensor, y: torch.Tensor) -> None:
        x.add_(y)

    def run_fill(xs: list[torch.Tensor]) -> None:
        for x in xs:
            x.fill_(7)

    add = define("add(Tensor(a!) x, Tensor y) -> ()", run_add, lambda x, y: None)
    fill = define("fill(Tensor(a!)[] xs) -> ()", run_fill, lambda xs: None)

    def model(x: torch.Tensor) -> Any:
        y, z = x + 1, x + 2
        add(y, y)
        fill([z])
        return y, z

    call, x = compiled(model), torch.ones(5, 4)
    assert [t[0, 0].item() for t in call(x)] == [4, 7]
    assert states(call) == {"add": "checked", "fill": "checked"}


def test_sizes_that_depend_on_data_are_left_open(define: Callable[..., Any]) -> None:
    def fake(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)

    f = define("f(Tensor x) -> Tensor", lambda x: x.flatten().nonzero()[:, 0], fake)
    call = compiled(lambda x: f(x) + 1)
    assert call(torch.tensor([[0.0, 1.0, 2.0]])).tolist() == [2, 3]
    assert states(call) == {"f": "checked"}


def test_each_layout_of_arguments_is_checked(define: Callable[..., Any]) -> None:
    f = define("f(Tensor x) -> Tensor", lambda x: x * 2, lambda x: x.new_empty(x.shape))
    assert compiled(lambda x: f(x) + 1)(torch.ones(5, 4)).shape == (5, 4)
    with pytest.raises(CustomOpError, match="strides of result 0"):
        compiled(lambda x: f(x) + f(x.t()).t())(torch.ones(5, 4))


def test_the_ops_of_torch_and_of_onegraph_are_not_custom() -> None:
    import onegraph.ops  # noqa: F401

    call = compiled(lambda x: torch.ops.aten.sin.default(x) + torch.nn.functional.gelu(x))
    call(torch.ones(5, 4))
    assert states(call) == {}


def test_ops_of_torch_library_say_it_too() -> None:
    @torch.library.custom_op(f"{NAMESPACE}::same", mutates_args=())
    def same(x: torch.Tensor) -> torch.Tensor:
        return x

    same.register_fake(torch.empty_like)
    with pytest.raises(CustomOpError, match="shares memory with an argument") as caught:
        compiled(lambda x: same(x) + 1)(torch.ones(5, 4))
    assert "clone()" in str(caught.value) and "same(x) + 1" in str(caught.value)


def test_an_opaque_function_is_checked_and_told_by_the_user_s_line() -> None:
    @onegraph.opaque(fake=lambda x: x.new_empty(x.shape[0], 3))
    def wide(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with pytest.raises(CustomOpError, match=r"is \[5, 4\], and its fake says \[5, 3\]") as caught:
        compiled(lambda x: wide(x) + 1)(torch.ones(5, 4))
    assert "wide(x) + 1" in str(caught.value)

    @onegraph.opaque
    def change_in_secret(x: torch.Tensor) -> torch.Tensor:
        return change(x)

    with pytest.raises(CustomOpError, match=r"changes its argument 'x'(.|\n)*mutates_args="):
        compiled(lambda x: change_in_secret(x))(torch.ones(5, 4))


def test_inference_mode(define: Callable[..., Any]) -> None:
    f = define("f(Tensor x) -> Tensor", lambda x: x * 2, torch.empty_like)
    call = compiled(lambda x: f(x) + 1)
    with torch.inference_mode():
        assert call(torch.ones(5, 4)).sum() == 60
    assert states(call) == {"f": "checked"}


def test_an_op_in_a_branch_of_cond_stays_pending(define: Callable[..., Any]) -> None:
    f = define("f(Tensor x) -> Tensor", lambda x: x * 2, torch.empty_like)
    g = define("g(Tensor x) -> Tensor", lambda x: x * 3, torch.empty_like)

    def model(x: torch.Tensor) -> torch.Tensor:
        return g(torch.cond(x.sum() > 0, lambda y: f(y), lambda y: y + 1, (x,)))

    call = compiled(model)
    assert call(torch.ones(5, 4)).sum() == 120
    assert states(call) == {"g": "checked", "f": "pending"}


def test_torch_compile_s_backend_checks_too(define: Callable[..., Any]) -> None:
    f = define("f(Tensor x) -> Tensor", change, torch.empty_like)
    torch._dynamo.reset()
    model = torch.compile(lambda x: f(x) + 1, backend="onegraph", options=EAGER)
    with pytest.raises(CustomOpError, match="changes its argument 'x'"), torch.no_grad():
        model(torch.ones(5, 4))
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_cache")
def test_with_inductor_an_opaque_branch_runs_at_every_size_and_is_stored() -> None:
    @onegraph.opaque
    def branch(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] > 4 else x.sin()

    def model(x: torch.Tensor) -> torch.Tensor:
        return branch(x * 3).sum(1) + 1

    stores = []
    for _ in range(2):
        call = compiled(model, backend="inductor")
        for size in (1, 4, 5, 64):
            x = torch.randn(size, 4)
            torch.testing.assert_close(call(x), model(x))
        stores.append(call.explain().pieces[0].ranges[0].store)
        assert list(states(call).values()) == ["checked"]
    assert stores == ["miss", "hit"]


def test_with_inductor_a_fake_that_lies_at_a_later_size_is_never_read() -> None:
    """The check sees one size; Inductor's own assertion on what an op returns sees the others."""

    @onegraph.opaque
    def sometimes_longer(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] != 20 else torch.cat([x, x])

    call = compiled(lambda x: sometimes_longer(x) + 1, backend="inductor")
    call(torch.ones(5, 4))
    with pytest.raises(AssertionError, match="expected size"):
        call(torch.ones(20, 4))
