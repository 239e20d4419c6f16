"""What can go wrong at capture: each error names the user's lines, torch's reason, and the ways out."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaMLP

import onegraph
from onegraph.errors import CaptureError, ConstraintError

EAGER = {"backend": "eager"}
ROWS = Dim("rows", min=1, max=4096)
OTHERS = Dim("others", min=1, max=32)


def refused(function: Any, *args: Any, dynamic_shapes: Any = None) -> Any:
    compiled = onegraph.compile(function, dynamic_shapes=dynamic_shapes or {"x": {0: ROWS}}, config=EAGER)
    with pytest.raises((CaptureError, ConstraintError)) as caught:
        compiled(*args or (torch.randn(8, 4),))
    return caught.value


def line_of(function: Callable[..., Any], text: str) -> str:
    """`file:line: source` of the line of the function that contains the text."""
    lines, first = inspect.getsourcelines(function)
    index = next(index for index, line in enumerate(lines) if text in line)
    return f"{__file__}:{first + index}: {lines[index].strip()}"


def prints(x: torch.Tensor) -> torch.Tensor:
    print("a batch of", x.shape)
    return x + 1


def item(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()


def to_list(x: torch.Tensor) -> torch.Tensor:
    return x + sum(x[0].long().tolist())


def to_cpu(x: torch.Tensor) -> torch.Tensor:
    return x.cpu() + 1


def to_numpy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.from_numpy(x.numpy())


def numpy_function(x: torch.Tensor) -> torch.Tensor:
    return x * np.sqrt(x.shape[1])


def decides_on_values(x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        return x
    return -x


def decides_on_an_item(x: torch.Tensor) -> torch.Tensor:
    if x.sum().item() > 0:
        return x
    return -x


def draws_in_python(x: torch.Tensor) -> torch.Tensor:
    return x * random.random()


@pytest.mark.parametrize(
    ("function", "text", "way_out"),
    [
        (prints, "print(", "outside of forward"),
        (item, ".item()", "keep the value in a tensor"),
        (to_list, ".tolist()", "keep the value"),
        (to_cpu, ".cpu()", "leave the tensor on its device"),
        (to_numpy, ".numpy()", "torch operations"),
        (numpy_function, "np.sqrt", "torch operations"),
        (decides_on_values, "if x.sum()", "torch.where"),
        (decides_on_an_item, "if x.sum()", "torch.where"),
        (draws_in_python, "random.random", "torch.rand"),
    ],
)
def test_what_leaves_the_graph_is_told_with_its_line_and_a_way_out(
    function: Callable[..., Any], text: str, way_out: str
) -> None:
    error = refused(function)
    assert isinstance(error, CaptureError)
    assert line_of(function, text) in error.where
    assert way_out in error.hint


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("inner")
        return x * 2


class ManyBreaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(1)
        print("first")
        x = self.inner(x)
        x = x * random.random()
        if x.sum() > 0:
            x = x * 2
        return x


def test_all_breaks_that_can_be_found_are_told_and_nothing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    module = ManyBreaks()
    error = refused(module)
    assert error.where.startswith(line_of(ManyBreaks.forward, 'print("first")'))
    for place in (
        line_of(Inner.forward, 'print("inner")'),
        line_of(ManyBreaks.forward, "random.random()"),
        line_of(ManyBreaks.forward, "if x.sum()"),
    ):
        assert place in error.where
    assert "inner" not in capsys.readouterr().out
    assert module.calls == []


def test_the_callers_of_a_broken_line_are_told() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    error = refused(Outer())
    assert error.where.startswith(line_of(Inner.forward, "print("))
    assert f"called from {line_of(Outer.forward, 'self.inner(x)')}" in error.where


def test_a_break_that_torch_could_support_comes_with_the_text_for_an_issue() -> None:
    error = refused(prints)
    assert "github.com/pytorch/pytorch" in error.hint and torch.__version__ in error.hint


def branch(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] > 64:
        return x * 2
    return x


def divisibility(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] % 128 == 0:
        return x * 2
    return x


def test_a_branch_on_a_size_is_told_with_its_condition_and_the_ways_out() -> None:
    error = refused(branch)
    assert isinstance(error, ConstraintError)
    assert [entry.expr for entry in error.constraints] == ["rows > 64"]
    assert error.constraints[0].effect == "narrows"
    assert error.where.startswith(line_of(branch, "if "))
    for way in (
        "no branch",
        "torch.where(",
        "@onegraph.opaque",
        'on_constraint="split"',
        'Dim("rows", min=65, max=4096)',
    ):
        assert way in error.hint
    assert "One graph serves every size" in str(error)


def test_the_narrower_dim_that_is_offered_works() -> None:
    narrower = {"x": {0: Dim("rows", min=65, max=4096)}}
    compiled = onegraph.compile(branch, dynamic_shapes=narrower, config=EAGER)
    for size in (65, 4096):
        torch.testing.assert_close(compiled(torch.ones(size, 2)), branch(torch.ones(size, 2)))


def squeezed(x: torch.Tensor) -> torch.Tensor:
    return x.squeeze(0) * 2


@pytest.mark.parametrize(
    "function",
    [squeezed, lambda x: x.squeeze() * 2, lambda x: torch.squeeze(x, dim=(0, 1)), lambda x: x.unsqueeze(0).squeeze()],
    ids=["method", "all dims", "several dims", "all but one"],
)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_squeezing_a_size_that_may_be_1_is_a_condition(function: Callable[..., Any], backend: str) -> None:
    with pytest.raises(ConstraintError, match=r"n != 1") as caught:
        onegraph.compile(function, dynamic_shapes={"x": {0: Dim("n", min=1, max=64)}}, config={"backend": backend})(
            torch.ones(3, 4)
        )
    assert caught.value.where is not None and __file__ in caught.value.where
    from_two = Dim("n", min=2, max=64)
    compiled = onegraph.compile(function, dynamic_shapes={"x": {0: from_two}}, config={"backend": backend})
    torch.testing.assert_close(compiled(torch.ones(3, 4)), function(torch.ones(3, 4)))


def test_squeezing_is_split_by_size() -> None:
    dims = {"x": {0: Dim("n", min=1, max=64)}}
    compiled = onegraph.compile(squeezed, dynamic_shapes=dims, config={"on_constraint": "split"})
    for size in (1, 2, 64, 1):
        torch.testing.assert_close(compiled(torch.ones(size, 4)), squeezed(torch.ones(size, 4)))


def test_squeezing_a_size_that_depends_on_data_is_refused() -> None:
    with pytest.raises(CaptureError, match="squeeze meets a size that depends on data"):
        onegraph.compile(lambda x: x.nonzero().squeeze(), config={"backend": "eager"})(torch.ones(3, 1))
    last = onegraph.compile(lambda x: x.nonzero().squeeze(-1), config={"backend": "eager"})
    assert last(torch.tensor([0, 1])).shape == (1,)


IDENTITY: dict[str, Callable[..., Any]] = {
    "id of an argument": lambda x, owner: x * 2 if id(x) == 0 else x,
    "argument and weight": lambda x, owner: x * 2 if x is owner.weight else x,
    "argument and weight as keys": lambda x, owner: x * len({x, owner.weight}),
}


@pytest.mark.parametrize("name", IDENTITY)
def test_identity_that_cant_be_compared_again_is_refused(name: str) -> None:
    owner = nn.Linear(3, 3)

    def asks(x: torch.Tensor) -> torch.Tensor:
        return IDENTITY[name](x, owner) + owner.bias  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match="the module asks") as caught:
        onegraph.compile(asks, config={"backend": "eager"})(torch.ones(3))
    assert caught.value.where is not None and __file__ in caught.value.where


def test_divisibility_is_told_in_words_of_python() -> None:
    error = refused(divisibility)
    assert [entry.expr for entry in error.constraints] == ["rows % 128 == 0"]
    assert 'Dim("rows", min=1, max=127)' in error.hint


def test_a_condition_on_two_dims_is_in_the_users_names() -> None:
    def compares(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > y.shape[0]:
            return x * 2
        return x

    error = refused(compares, torch.ones(3, 2), torch.ones(5, 2), dynamic_shapes={"x": {0: ROWS}, "y": {0: OTHERS}})
    assert [entry.expr for entry in error.constraints] == ["rows > others"]


def test_a_size_that_is_needed_is_told_with_torch_s_own_place() -> None:
    def adds(x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(8, 4)

    error = refused(adds)
    assert isinstance(error, ConstraintError)
    assert "rows == 8" in [entry.expr for entry in error.constraints]
    assert line_of(adds, "torch.ones") in error.where


TABLE = [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x * TABLE[x.shape[0] % 4],
        lambda x: x * {8: 2.0}.get(x.shape[0], 1.0),
        lambda x: x * len(str(x.shape[0])),
        lambda x: x * sum(1 for _ in range(x.shape[0])),
        lambda x: x * (x.shape[0]).bit_length(),
        lambda x: torch.cat([x] * x.shape[0]),
        lambda x: x * hash(x.shape[0]),
        lambda x: x * max(x.shape[0], 16),
        lambda x: x * float(f"{x.shape[0]}"),
    ],
    ids=["list", "dict", "str", "range", "bit_length", "repeat", "hash", "max", "format"],
)
def test_a_value_that_python_computes_from_a_size_is_right_or_refused(use: Callable[[torch.Tensor], Any]) -> None:
    compiled = onegraph.compile(use, dynamic_shapes={"x": {0: Dim("rows", min=1, max=64)}}, config=EAGER)
    try:
        compiled(torch.ones(8, 2))
    except (CaptureError, ConstraintError):
        return
    for size in (1, 2, 7, 64):
        torch.testing.assert_close(compiled(torch.ones(size, 2)), use(torch.ones(size, 2)))


class BranchingMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 16:
            return super().forward(x) * 1.0
        return super().forward(x)


class PrintingMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("rows", x.shape[1])
        return super().forward(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat(x.chunk(2)[::-1]),
        lambda x: torch.cat(x.split(16)[::-1]),
        lambda x: x * torch.linspace(0, 1, x.shape[0])[:, None],
        lambda x: x * math.log(x.shape[0]),
        lambda x: x * x.shape[0].bit_length(),
        lambda x: sum(x.unbind(0)),
    ],
    ids=["chunk", "split", "linspace", "logarithm", "bit length", "unbind"],
)
def test_a_number_from_a_size_is_told_as_such_and_may_be_split(function: Callable[..., Any]) -> None:
    error = refused(function)
    assert "[OG-CONSTRAINT] the model needs a number that follows from a size that is declared dynamic:" in str(error)
    assert "rows" in error.constraints[0].expr
    assert 'on_constraint="split"' in str(error)
    few = {"x": {0: Dim("rows", min=30, max=34)}}
    split = onegraph.compile(function, dynamic_shapes=few, config={**EAGER, "on_constraint": "split"})
    for rows in range(30, 35):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(split(x), function(x))


def test_a_range_that_would_be_split_into_many_tells_the_first_conditions() -> None:
    compiled = onegraph.compile(
        lambda x: x * x.shape[0].bit_length(),
        dynamic_shapes={"x": {0: Dim("rows", min=1, max=64)}},
        config={**EAGER, "on_constraint": "split"},
    )
    with pytest.raises(ConstraintError, match=r"more than 8 regions") as caught:
        compiled(torch.randn(8, 4))
    assert len(caught.value.constraints) > 8
    assert f"and {len(caught.value.constraints) - 8} more" in str(caught.value)


@pytest.mark.parametrize(("mlp", "kind"), [(BranchingMLP, ConstraintError), (PrintingMLP, CaptureError)])
def test_a_line_inside_a_transformers_model_is_told(mlp: type[LlamaMLP], kind: type[Exception]) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaModel(config).eval()
    model.layers[1].mlp = mlp(config)
    error = refused(
        model,
        torch.arange(8)[None],
        dynamic_shapes={"input_ids": {1: Dim("tokens", min=2, max=64)}},
    )
    assert isinstance(error, kind)
    assert line_of(mlp.forward, "if x.shape" if kind is ConstraintError else "print(") in error.where


COUNTED = {"calls": 0}
NAMES: list[str] = []


class ChangesGlobals(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global SEEN
        COUNTED["calls"] += 1
        NAMES.append("name")
        SEEN = True
        print("first")
        print("second")
        return x * 2


SEEN = False


class ChangesGlobalsDecorated(ChangesGlobals):
    forward = torch.no_grad()(ChangesGlobals.forward)


@pytest.mark.parametrize("module", [ChangesGlobals, ChangesGlobalsDecorated])
def test_looking_for_further_breaks_changes_no_globals(module: type[nn.Module]) -> None:
    error = refused(module())
    assert line_of(ChangesGlobals.forward, '"first"') in error.where
    if module is ChangesGlobals:  # torch's trace of further breaks ends where a decorator's context is left
        assert line_of(ChangesGlobals.forward, '"second"') in error.where
    assert COUNTED == {"calls": 0} and NAMES == [] and SEEN is False
