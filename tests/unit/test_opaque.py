"""onegraph.opaque: names, inferred fakes, redefinition, and what can't be an op."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.export import Dim

import onegraph
from onegraph.errors import CustomOpError

EAGER = {"backend": "eager"}
TOKENS = Dim("num_tokens", min=1, max=64)


@onegraph.opaque
def pick(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
    """Doubles what is long."""
    return x * scale if x.shape[0] > 4 else x.sin()


def op_name(fn: Any) -> str:
    """The op that a call of an opaque function runs."""
    name: str = fn.__closure__[0].cell_contents.name()
    return name


def compiled(fn: Callable[..., Any], *names: str, dim: Dim = TOKENS) -> Any:
    return onegraph.compile(fn, dynamic_shapes={name: {0: dim} for name in names}, config=EAGER)


def test_the_function_stays_what_it_was() -> None:
    assert pick.__name__ == "pick" and pick.__doc__ == "Doubles what is long."
    assert torch.equal(pick(torch.ones(5)), torch.full((5,), 2.0))
    assert torch.equal(pick(torch.ones(2), scale=3.0), torch.ones(2).sin())


@pytest.mark.parametrize("first", [1, 3, 64])
def test_a_branch_on_the_size_is_taken_anew_on_every_call(first: int) -> None:
    call = compiled(lambda x: pick(x) + 1, "x")
    for size in (first, 1, 4, 5, 64):
        x = torch.randn(size, 3)
        torch.testing.assert_close(call(x), pick(x) + 1)
    assert call.explain().ledger.shapes == ()


@pytest.mark.parametrize("limit", [64, 2])
def test_a_size_of_a_result_is_a_size_of_an_argument_or_constant(limit: int) -> None:
    @onegraph.opaque
    def table(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert y.shape[0] <= limit, "a size outside the declared range"
        return torch.zeros(y.shape[0], 7, x.shape[0], dtype=torch.int32), x[:0].sum()

    def model(x: torch.Tensor, y: torch.Tensor) -> Any:
        first, second = table(x, y)
        return first.sum(1), second

    other = Dim("other", min=1, max=limit)
    call = onegraph.compile(model, dynamic_shapes={"x": {0: TOKENS}, "y": {0: other}}, config=EAGER)
    for sizes in ((64, 2), (1, 1), (2, 2)):  # the first call is checked: its sizes differ
        first, second = call(torch.zeros(sizes[0]), torch.zeros(sizes[1]))
        assert first.shape == (sizes[1], sizes[0]) and second.shape == ()


def half(x: torch.Tensor) -> torch.Tensor:
    return x[: x.shape[0] // 2].clone()


def transposed(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided((x.shape[0], 3), (1, x.shape[0]))


def other_dtype(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.shape[0] > 10 else x.clone()


def reads_data(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.sum().item() > 0 else x * 3


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (half, r"size 0 of its result is neither constant nor a size of an argument: 1 at size 3, 32 at size 64"),
        (transposed, "isn't contiguous"),
        (other_dtype, "dtype, device or rank"),
        (reads_data, "at size 3 it raises DataDependentOutputException"),
    ],
)
def test_a_fake_that_cant_be_inferred_is_asked_for(fn: Any, reason: str) -> None:
    op = onegraph.opaque(fn)
    with pytest.raises(CustomOpError, match=rf"no fake can be inferred for {fn.__name__}: .*{reason}") as caught:
        compiled(lambda x: op(x) + 1, "x")(torch.ones(3, 3))
    assert f"{__file__}:{fn.__code__.co_firstlineno}" in str(caught.value) and "fake=" in str(caught.value)


def test_a_given_fake_is_used() -> None:
    op = onegraph.opaque(fake=lambda x: x.new_empty(x.shape[0] // 2, *x.shape[1:]))(half)
    call = compiled(lambda x: op(x) + 1, "x", dim=Dim("n", min=2, max=64))
    for size in (3, 2, 64):
        assert call(torch.ones(size, 3)).shape == (size // 2, 3)


def test_an_argument_that_is_changed_is_named() -> None:
    @onegraph.opaque(mutates_args=["x"])
    def double_(x: torch.Tensor) -> None:
        x.mul_(2 if x.shape[0] > 4 else 3)

    def model(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        double_(y)
        return y

    call = compiled(model, "x")
    for size in (1, 5):
        assert torch.equal(call(torch.ones(size)), model(torch.ones(size)))


def test_a_result_that_shares_memory_is_refused_whenever_it_is_made() -> None:
    @onegraph.opaque
    def sometimes(x: torch.Tensor) -> torch.Tensor:
        return x[1:] if x.shape[0] > 4 else x[1:].clone()

    assert sometimes(torch.ones(3)).shape == (2,)
    with pytest.raises(CustomOpError, match=r"shares memory with an argument.*\n.*\n.*clone\(\)"):
        sometimes(torch.ones(5))


def test_results_that_share_memory_are_refused() -> None:
    @onegraph.opaque
    def twins(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x + 1
        return y, y[:1]

    with pytest.raises(CustomOpError, match="with another result"):
        twins(torch.ones(3))


def no_annotation(x):  # type: ignore[no-untyped-def]
    return x


def wrong_annotation(x: dict[str, int]) -> torch.Tensor:
    return torch.ones(1)


@pytest.mark.parametrize("fn", [no_annotation, wrong_annotation, torch.sin, 3])
def test_what_cant_be_an_op_is_refused_in_three_parts(fn: Any) -> None:
    with pytest.raises(CustomOpError, match="annotat") as caught:
        onegraph.opaque(fn)
    assert caught.value.message and caught.value.hint
    assert isinstance(fn, types.FunctionType) is (caught.value.where is not None)


def defined(body: str, **variables: Any) -> Any:
    namespace: dict[str, Any] = {"torch": torch, "__name__": "users_module", **variables}
    exec(f"def f(x: torch.Tensor) -> torch.Tensor:\n    return {body}", namespace)
    return onegraph.opaque(namespace["f"])


def test_changed_code_is_another_op() -> None:
    first, second = defined("x * 2"), defined("x * 3")
    assert op_name(first) != op_name(second)
    assert first(torch.ones(1)).item() == 2 and second(torch.ones(1)).item() == 3


def test_equal_code_over_other_variables_is_another_op() -> None:
    first, second = defined("x * k", k=2), defined("x * k", k=3)
    assert op_name(first) != op_name(second)
    assert first(torch.ones(1)).item() == 2 and second(torch.ones(1)).item() == 3

    def scaled(factor: Any) -> Any:
        @onegraph.opaque
        def scale(x: torch.Tensor) -> torch.Tensor:
            return x * factor

        return scale

    tensors = [torch.ones(1) * k for k in (2, 3)]
    assert [scaled(t)(torch.ones(1)).item() for t in tensors] == [2, 3]
    assert [scaled(k)(torch.ones(1)).item() for k in (2, 3, True, 1)] == [2, 3, 1, 1]


def test_a_module_that_is_loaded_again_gets_the_same_op() -> None:
    namespace: dict[str, Any] = {"torch": torch, "__name__": "users_module"}
    names = []
    for _ in range(2):
        exec("def again(x: torch.Tensor) -> torch.Tensor:\n    return x * 5", namespace)
        names.append(op_name(onegraph.opaque(namespace["again"])))
    assert names[0] == names[1]


def test_another_fake_is_another_op() -> None:
    def make(fake: Any) -> str:
        return op_name(onegraph.opaque(fake=fake)(half))

    assert make(lambda x: x.new_empty(2)) != make(lambda x: x.new_empty(3))


def test_a_name_is_the_same_in_every_process() -> None:
    program = """
import torch, onegraph
@onegraph.opaque
def stable(x: torch.Tensor, mode: str = "a") -> torch.Tensor:
    return x * 2 if mode in {"a", "b", "c", "d"} else (lambda y: y + 1)(x)
print(stable.__closure__[0].cell_contents.name())
"""
    names = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(names) == 1 and "onegraph_opaque::main_stable_" in names.pop()
