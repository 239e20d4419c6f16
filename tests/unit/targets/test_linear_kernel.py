"""The CPU's kernels of `onegraph::linear` against fp64: shapes, layouts, threads, what must not spread between rows."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from onegraph.ir.linear import PLAIN, TOKENS, LinearShape
from onegraph.ops import linear as reference
from onegraph.ops.library import implementation
from onegraph.targets.cpu.linear import BLOCKED, MATRIX, VECTOR, Linear
from onegraph.torch_compat import cpu_facts

pytestmark = pytest.mark.usefixtures("op_kernels")

KernelsBuiltWith = Callable[..., Mapping[str, Callable[..., Any]]]

has_matrices = "amx_bf16" in cpu_facts.cpu_flags()
has_blocks = not {"avx512_bf16", "bf16"} & set(cpu_facts.cpu_flags().split())
PAIRS = [(VECTOR, torch.float32), (VECTOR, torch.bfloat16), (PLAIN, torch.bfloat16)]
PAIRS += [(MATRIX, torch.bfloat16)] if has_matrices else []
PAIRS += [(BLOCKED, torch.float32), (BLOCKED, torch.bfloat16)] if has_blocks else []
pairs = pytest.mark.parametrize(("kernel", "dtype"), PAIRS, ids=str)

SIZES = list(itertools.product((1, 7, 8, 31, 32, 33, 100), (1, 2, 15, 31, 32, 40, 100)))  # outputs, inputs


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Linear:
    """The op that the dispatcher calls, without choices."""
    found = implementation("linear", "CPU")
    assert isinstance(found, Linear)
    monkeypatch.setattr(found, "_chosen", {})
    return found


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(num_tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens * 10**6 + outputs * 10**3 + inputs)
    sizes = ((num_tokens, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x, weight, bias


def use(op: Linear, kernel: str, weight: torch.Tensor) -> None:
    op.choose(LinearShape(*weight.shape, weight.dtype), (kernel,) * len(TOKENS))


def assert_right(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Within one rounding of the exact result, and the sums' own errors in fp32."""
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    summed = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    rounding = 2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-23
    assert found.shape == exact.shape and found.dtype == x.dtype and found.is_contiguous()
    assert ((found.double() - exact).abs() <= rounding * exact.abs() + 2e-6 * summed + 1e-37).all()


@pairs
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 16, 17, 33, 70])
def test_all_sizes(op: Linear, kernel: str, dtype: torch.dtype, num_tokens: int) -> None:
    for outputs, inputs in SIZES:
        x, weight, bias = drawn(num_tokens, outputs, inputs, dtype)
        use(op, kernel, weight)
        assert_right(op(x, weight, bias), x, weight, bias)


@pairs
@pytest.mark.parametrize(
    ("num_tokens", "outputs", "inputs"), [(9, 50, 1160), (40, 25, 577), (530, 26, 37), (1030, 13, 3)]
)
def test_larger_sizes(op: Linear, kernel: str, dtype: torch.dtype, num_tokens: int, outputs: int, inputs: int) -> None:
    """More than one block of inputs, of tokens, of rows."""
    x, weight, bias = drawn(num_tokens, outputs, inputs, dtype)
    use(op, kernel, weight)
    assert_right(op(x, weight, bias), x, weight, bias)


@pairs
def test_errors_are_no_larger_than_pytorchs(op: Linear, kernel: str, dtype: torch.dtype) -> None:
    """Against fp64, where sums are long."""
    for num_tokens, inputs in ((2, 600), (16, 1536), (70, 3000)):
        x, weight, _ = drawn(num_tokens, 30, inputs, dtype)
        exact = x.double() @ weight.double().T
        use(op, kernel, weight)
        found, plain = (one.double() - exact for one in (op(x, weight, None), torch.mm(x, weight.t())))
        assert found.norm() <= 1.5 * plain.norm() and found.abs().max() <= 2 * plain.abs().max()


@pairs
def test_more_threads_than_rows(op: Linear, kernel: str, dtype: torch.dtype) -> None:
    x, weight, bias = drawn(300, 14, 64, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        use(op, kernel, weight)
        assert_right(op(x, weight, bias), x, weight, bias)
    finally:
        torch.set_num_threads(before)


@pairs
def test_a_tokens_result_does_not_depend_on_the_others(op: Linear, kernel: str, dtype: torch.dtype) -> None:
    x, weight, bias = drawn(37, 50, 100, dtype)
    use(op, kernel, weight)
    together = op(x, weight, bias)
    for first, last in ((0, 1), (3, 8), (20, 37)) if kernel != PLAIN else ():
        assert torch.equal(op(x[first:last], weight, bias), together[first:last])


@pairs
def test_threads_and_no_bias(op: Linear, kernel: str, dtype: torch.dtype, threads: int) -> None:
    """Large enough to be shared among threads; what a thread gives doesn't depend on how many there are."""
    for num_tokens in (1, 3, 40):
        x, weight, _ = drawn(num_tokens, 333, 270, dtype)
        use(op, kernel, weight)
        found = op(x, weight, None)
        assert_right(found, x, weight)
        torch.set_num_threads(3 - threads)
        use(op, kernel, weight)
        if kernel != PLAIN:
            assert torch.equal(op(x, weight, None), found)
        torch.set_num_threads(threads)


@pairs
def test_a_wrong_kernel_would_be_seen(op: Linear, kernel: str, dtype: torch.dtype) -> None:
    """One input of one output left out, in the last place, is more than the tolerance allows."""
    x, weight, bias = drawn(3, 33, 100, dtype)
    use(op, kernel, weight)
    found = op(x, weight, bias)
    found[2, 32] -= x[2, 99] * weight[32, 99]
    with pytest.raises(AssertionError):
        assert_right(found, x, weight, bias)


@pairs
def test_rows_may_lie_apart(op: Linear, kernel: str, dtype: torch.dtype) -> None:
    """Slices of wider rows, with NaN beside them, for tokens, weights and results of three dims."""
    for num_tokens, inputs in ((1, 50), (5, 50), (20, 64)):
        _, weight, bias = drawn(num_tokens, 37, inputs, dtype)
        wide = torch.full((1, num_tokens, inputs + 9), torch.nan, dtype=dtype)
        wide[..., :inputs] = torch.randn(1, num_tokens, inputs)
        wider_weight = torch.full((37, inputs + 5), torch.nan, dtype=dtype)
        wider_weight[:, :inputs] = weight
        use(op, kernel, weight)
        for x in (
            wide[..., :inputs],
            wide[0, :, :inputs],
            wide[..., :inputs].contiguous().expand(2, -1, -1).contiguous(),
        ):
            assert_right(op(x, wider_weight[:, :inputs], bias), x, weight, bias)


@pairs
def test_out_is_written(op: Linear, kernel: str, dtype: torch.dtype) -> None:
    """And nothing beside it."""
    x, weight, bias = drawn(5, 37, 50, dtype)
    use(op, kernel, weight)
    memory = torch.full((7, 37), 3.0, dtype=dtype)
    found = op(x[None], weight, bias, out=memory[None, 1:6])
    assert found.data_ptr() == memory[1:6].data_ptr()
    assert_right(memory[1:6], x, weight, bias)
    assert (memory[0] == 3).all() and (memory[6] == 3).all()


@pairs
@pytest.mark.parametrize("num_tokens", [2, 5, 16, 20])
def test_what_is_not_finite_stays_in_its_row_and_column(
    op: Linear, kernel: str, dtype: torch.dtype, num_tokens: int
) -> None:
    x, weight, bias = drawn(num_tokens, 37, 50, dtype)
    use(op, kernel, weight)
    for value in (torch.nan, torch.inf):
        bad_x, bad_weight = x.clone(), weight.clone()
        bad_x[1, 49], bad_weight[36, 0] = value, value
        wrong = ~op(bad_x, bad_weight, bias).isfinite()
        assert wrong[1].all() and wrong[:, 36].all() and wrong.sum() == num_tokens + 36


@pairs
def test_no_rows(op: Linear, kernel: str, dtype: torch.dtype) -> None:
    for shape, outputs in (((0, 8), 5), ((1, 0, 8), 5), ((3, 8), 0)):
        weight = torch.ones(outputs, 8, dtype=dtype)
        use(op, kernel, weight)
        assert op(torch.ones(shape, dtype=dtype), weight, None).shape == (*shape[:-1], outputs)


def test_what_kernels_do_not_do_is_the_references(op: Linear) -> None:
    """Other dtypes, columns that lie apart, no inputs, one dim; results are the same, and contiguous."""
    x, weight, bias = drawn(4, 6, 8, torch.float64)
    cases = [(x, weight, bias), (x.half(), weight.half(), None), (x[:, :0], weight[:, :0], bias)]
    x, weight, bias = x.float(), weight.float(), bias.float()
    cases += [(x.t().contiguous().t(), weight, bias), (x, weight.t().contiguous().t(), bias), (x[0], weight, bias)]
    cases += [(x.view(2, 2, 8).transpose(0, 1), weight, None), (x, weight, torch.ones(12)[::2])]
    for case in cases:
        found = op(*case)
        torch.testing.assert_close(found, reference.linear(*case))
        assert found.is_contiguous()
    with pytest.raises(RuntimeError):
        op(x, weight[:, :7], None)


def test_the_kernels_are_what_runs(op: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the dispatcher, for the layouts that models have."""

    def fail(*arguments: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference, "linear", fail)
    for dtype in (torch.float32, torch.bfloat16):
        for num_tokens in (1, 9, 600):
            x, weight, bias = drawn(num_tokens, 64, 96, dtype)
            for given in (x, x[None]):
                assert_right(torch.ops.onegraph.linear(given, weight, bias).view(-1, 64), x, weight, bias)


def test_the_rule_has_a_kernel_for_each_number_of_tokens(op: Linear) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rule = op.rule(dtype)
        assert len(rule) == len(TOKENS) and set(rule) <= set(op.kernels(dtype))
        assert rule[-1] == (BLOCKED if has_blocks and dtype == torch.bfloat16 else PLAIN)
    assert op.kernels(torch.float16) == (PLAIN,)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize(
    "flags",
    [("-march=x86-64", "-mno-avx", "-mno-fma"), ("-march=haswell", "-mno-avx512f"), ("-mno-amx-bf16",)],
    ids=" ".join,
)
def test_other_instruction_sets(kernels_built_with: KernelsBuiltWith, flags: tuple[str, ...]) -> None:
    op = kernels_built_with(*flags)["linear"]
    assert isinstance(op, Linear) and MATRIX not in op.kernels(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        for kernel in {VECTOR, BLOCKED} & set(op.kernels(dtype)):
            for num_tokens, (outputs, inputs) in itertools.product((1, 2, 3, 9), SIZES):
                x, weight, bias = drawn(num_tokens, outputs, inputs, dtype)
                use(op, kernel, weight)
                assert_right(op(x, weight, bias), x, weight, bias)
