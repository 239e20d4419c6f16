"""What of Inductor's wrapper is done once for a size, and what it keeps doing in each call."""

from typing import Any

import pytest
import torch

from onegraph.compilers.prepared import Prepared, prepare

HEADER = """
kernel_0 = kernels['kernel_0']

class Runner:
    def call(self, args):
"""


def prepared(body: str) -> Prepared:
    found = prepare(HEADER + "".join(f"        {line}\n" for line in body.strip().splitlines()))
    assert found is not None
    return found


def functions(found: Prepared, **names: Any) -> dict[str, Any]:
    known = {
        "torch": torch,
        "reinterpret_tensor": torch._C._dynamo.guards._reinterpret_tensor,
        "assert_size_stride": torch._C._dynamo.guards.assert_size_stride,
        **names,
    }
    exec(found.source, known)
    return known


SCALED = """
arg0_1, arg1_1 = args
args.clear()
u0 = arg0_1
arg1_1_size = arg1_1.size()
u1 = arg1_1_size[1]
if not (u0 >= 1):
    raise RuntimeError('u0 >= 1')
buf0 = None
assert_size_stride(arg1_1, (u0, u1), (u1, 1), 'input')
buf1 = empty_strided_cpu((u0, u1), (u1, 1), torch.float32)
kernel_0(arg1_1, buf1, u0)
buf2 = empty_strided_cpu((u0, 2*u1), (2*u1, 1), torch.float32)
buf3 = reinterpret_tensor(buf2, (u0, u1), (2*u1, 1), 0)  # alias
kernel_0(reinterpret_tensor(buf1, (u0, u1), (u1, 1), 0), buf3, u0)
del buf1
buf4 = reinterpret_tensor(buf2, (u0, u1), (2*u1, 1), 3); del buf2  # reuse
kernel_0(arg1_1, buf4, u0)
del arg1_1
return (buf4, None, )
"""


def test_lines_are_those_of_the_wrapper() -> None:
    found = prepared(SCALED)
    wrapper = ["", *(HEADER + SCALED.lstrip()).splitlines()]
    text = found.source.splitlines()
    assert len(text) == len(found.lines)
    calls = [wrapper[line] for shown, line in zip(text, found.lines, strict=True) if "kernel_0(" in shown]
    assert calls == [line for line in wrapper if line.startswith("kernel_0(")]
    assert text[0].startswith("def ") and found.lines[0] == 0


def test_a_call_only_runs_kernels() -> None:
    found = prepared(SCALED)
    assert [(one.input, one.asked) for one in found.sizes] == [(0, ""), (1, ".shape[1]")]
    assert found.size_names == ("u0", "u1") and found.kept_inputs == frozenset()
    assert [(one.name, one.layout) for one in found.scratch] == [("buf1", "(u0, u1), (u1, 1), torch.float32")]
    assert [one.name for one in found.results] == ["buf2"] and [one and one[0] for one in found.outputs] == [0, None]
    body = found.source.split("def run(")[1]
    assert not any(word in body for word in ("empty_strided", "assert_", "reinterpret", "raise", "buf0", "buf1 ="))

    def kernel(given: torch.Tensor, out: torch.Tensor, size: int) -> None:
        out.copy_(given * 2)

    made = functions(found, kernel_0=kernel)
    assert made["scratch_layouts"](2, 3) == [((2, 3), (3, 1), torch.float32)]
    assert made["results_layouts"](2, 3) == [((2, 6), (6, 1), torch.float32)]
    x, result = torch.ones(2, 3), torch.zeros(2, 6)
    outputs = made["run"](made["scratch"]([torch.empty(2, 3)], 2, 3), made["results"]([result], 2, 3), [2, x])
    assert outputs[1] is None and outputs[0].data_ptr() == result[:, 3:].data_ptr()
    assert result.tolist() == [[4, 4, 4, 2, 2, 2]] * 2
    made["check"]([2, x], 2, 3)
    with pytest.raises(AssertionError, match="stride"):
        made["check"]([2, torch.ones(3, 2).t()], 2, 3)
    with pytest.raises(AssertionError, match="size"):
        made["check"]([2, torch.ones(4, 3)], 2, 3)


@pytest.mark.parametrize(
    "use",
    [
        "buf5 = torch.ops.mylib.keeps.default(buf1)",
        "torch.ops.mylib.writes.default(buf1)",
        "buf5 = reinterpret_tensor(buf1, (u0,), (1,), 0); buf6 = torch.ops.aten.view.default(buf5, [1])",
        "aten.index_put_(buf1, [arg1_1], buf1)",
        "buf5, buf6 = something(buf1)",
        "if u0 > 1:\n    kernel_0(buf1)",
        "for i in range(u0):\n    kernel_0(buf1)",
        "buf1 = empty_strided_cpu((u0, ), (1, ), torch.float32)",
        "extern_kernels.convolution(buf1, arg1_1)",
        "u7 = buf1.item()",
        "u7 = foo(arg1_1); kernel_0(reinterpret_tensor(buf1, (u7, ), (1, ), 0))",
        "u7 = foo(arg1_1); buf7 = reinterpret_tensor(buf1, (u7, ), (1, ), 0); kernel_0(buf7)",
    ],
)
def test_a_buffer_that_goes_to_anything_but_a_kernel_is_allocated_in_each_call(use: str) -> None:
    found = prepared(
        "arg0_1, arg1_1 = args\nargs.clear()\nu0 = arg0_1\n"
        "buf1 = empty_strided_cpu((u0, ), (1, ), torch.float32)\n"
        f"buf2 = empty_strided_cpu((u0, ), (1, ), torch.float32)\n{use}\nkernel_0(buf1, buf2)\nreturn (buf2, )"
    )
    assert not found.scratch and [one.name for one in found.results] == ["buf2"]
    assert "buf1 = empty_strided_cpu((u0,), (1,), torch.float32)" in found.source.split("def run(")[1]


def test_a_name_that_is_given_twice_is_allocated_where_it_stands() -> None:
    found = prepared(
        "arg0_1, = args\nbuf1 = foo(arg0_1)\nkernel_0(buf1)\n"
        "buf1 = empty_strided_cpu((2, ), (1, ), torch.float32)\nkernel_0(buf1)\nreturn (arg0_1, )"
    )
    assert not found.scratch and found.source.count("buf1 = empty_strided_cpu") == 1


def test_a_buffer_whose_size_is_found_in_the_call_is_allocated_there() -> None:
    found = prepared(
        "arg0_1, = args\nargs.clear()\nu0 = torch.ops.aten.item.default(arg0_1)\n"
        "buf1 = empty_strided_cpu((u0, ), (1, ), torch.float32)\nkernel_0(buf1, u0)\nreturn (buf1, u0, )"
    )
    assert not found.scratch and not found.results and found.outputs == (None, None)
    assert found.kept_inputs == {0}


@pytest.mark.parametrize("returned", ["arg0_1", "reinterpret_tensor(arg0_1, (2, ), (1, ), 0)", "buf1", "foo(arg0_1)"])
def test_an_input_that_is_returned_is_kept(returned: str) -> None:
    found = prepared(
        f"arg0_1, arg1_1 = args\nargs.clear()\nbuf1 = arg0_1\nkernel_0(arg0_1, arg1_1)\nreturn ({returned}, )"
    )
    assert found.kept_inputs == {0} and found.outputs == (None,)


@pytest.mark.parametrize(
    "source", ["", "x = 1\n", "def call(args):\n    pass\n", f"{HEADER}        return call_2(args)\n"]
)
def test_another_form_is_left_alone(source: str) -> None:
    assert prepare(source) is None
