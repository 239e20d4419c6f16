"""Wrappers as Inductor writes them for a GPU: kernels of both languages become look-ups, in order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onegraph.compilers.loading import _with_aligned_inputs
from onegraph.compilers.wrapper import put_together, take_apart
from onegraph.errors import CompileError
from onegraph.ir.target import KernelSource
from onegraph.ops.library import OutFunctions

WRAPPER = '''
from torch._inductor.async_compile import AsyncCompile
async_compile = AsyncCompile()

# kernel path: somewhere
triton_poi_0 = async_compile.triton('triton_poi_0', """
import triton
""", device_str='cuda')

cpp_fused_1 = async_compile.cpp_pybinding(['const float*'], r"""
void kernel() {}
""")

my_kernel_2 = async_compile.triton('my_kernel', """
import triton
""", device_str='cuda')

async_compile.wait(globals())
del async_compile

def call(args):
    return triton_poi_0, cpp_fused_1, my_kernel_2
'''
KERNELS = (
    KernelSource("kernel_0", (), "import triton", "triton", "triton_poi_0"),
    KernelSource("kernel_1", ("const float*",), "void kernel() {}"),
    KernelSource("kernel_2", (), "import triton", "triton", "my_kernel"),
)


def test_kernels_become_look_ups(tmp_path: Path) -> None:
    source = take_apart(WRAPPER, KERNELS)
    functions = {kernel.name: kernel.function for kernel in KERNELS}
    names = put_together(tmp_path / "wrapper.py", source, functions, OutFunctions("CPU"), {})
    assert names["call"]([]) == ("triton_poi_0", "kernel", "my_kernel")


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 1), (2, 1, 0)])
def test_other_kernels_than_the_text_names_are_an_error(order: tuple[int, ...]) -> None:
    with pytest.raises(CompileError, match="doesn't name in a known form"):
        take_apart(WRAPPER, tuple(KERNELS[index] for index in order))


def test_a_misaligned_input_is_copied_and_what_was_written_comes_back() -> None:
    def call(inputs: list[torch.Tensor]) -> tuple[torch.Tensor]:
        assert all(x.data_ptr() % 16 == 0 for x in inputs)
        x, y = inputs
        inputs.clear()
        x.mul_(2)
        return (x + y,)

    run = _with_aligned_inputs(call, (0, 1), mutates_inputs=True)
    base = torch.arange(33, dtype=torch.float32)
    x, y = base[1:].view(4, 8).t(), torch.ones(8, 4)
    expected = x * 2 + y
    assert torch.equal(run([x, y])[0], expected)
    assert torch.equal(base, torch.cat([torch.zeros(1), torch.arange(1, 33) * 2.0]))
    overlapping = base[1:2].expand(8, 4)
    assert torch.equal(_with_aligned_inputs(lambda inputs: inputs, (0,), False)([overlapping])[0], overlapping)
