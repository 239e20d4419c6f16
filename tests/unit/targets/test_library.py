"""One library from many kernels: names, deduplication, and which loops are shared among threads."""

from __future__ import annotations

from onegraph.ir.target import KernelSource
from onegraph.targets.cpu.library import library_source, only_kernels

SHARED = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel(const float* in_ptr0, float* out_ptr0, const int64_t ks0)
{
    #pragma omp parallel
    {
        int tid = omp_get_thread_num();
        {
            #pragma omp for
            for(int64_t x0=static_cast<int64_t>(0L); x0<static_cast<int64_t>(ks0); x0+=static_cast<int64_t>(1L))
            {
                for(int64_t x1=static_cast<int64_t>(0L); x1<static_cast<int64_t>(64L); x1+=static_cast<int64_t>(16L))
                {
                }
            }
        }
    }
}
"""
ARGUMENTS = ("const float*", "float*", "const int64_t")


def test_a_dynamic_loop_is_shared_only_where_its_work_is_worth_it() -> None:
    text = library_source([KernelSource("a", ARGUMENTS, SHARED)])
    assert "#pragma omp parallel if((ks0) * (64L) > 32768)\n" in text


def test_a_loop_of_static_size_stays_as_inductor_wrote_it() -> None:
    static = SHARED.replace("<static_cast<int64_t>(ks0)", "<static_cast<int64_t>(4096L)")
    assert "#pragma omp parallel\n" in library_source([KernelSource("a", ARGUMENTS, static)])


def test_work_that_is_divided_by_thread_numbers_stays_as_it_is() -> None:
    """A region entered by one thread would do only that thread's part."""
    for by_hand in (
        SHARED.replace("#pragma omp for", "const int64_t start = tid * (ks0 / 2);"),
        SHARED.replace("#pragma omp for", "#pragma omp for\n const int64_t part = tid;"),
        SHARED.replace("#pragma omp for", "#pragma omp for\n const int n = omp_get_num_threads();"),
    ):
        assert "if(" not in library_source([KernelSource("a", ARGUMENTS, by_hand)]).split("namespace kernel_0")[1]


def test_accumulators_of_each_thread_are_fine() -> None:
    accumulating = SHARED.replace("#pragma omp for", "#pragma omp for\n total_arr[tid] = 0;")
    assert "if((ks0) * (64L) > 32768)" in library_source([KernelSource("a", ARGUMENTS, accumulating)])


def test_equal_kernels_are_built_once_under_all_their_names() -> None:
    text = library_source([KernelSource("a", ARGUMENTS, SHARED), KernelSource("b", ARGUMENTS, SHARED)])
    assert text.count("namespace kernel_") == 1
    assert (
        '{"a", reinterpret_cast<PyCFunction>(call_0)' in text and '{"b", reinterpret_cast<PyCFunction>(call_0)' in text
    )


def test_includes_stand_once_at_the_top() -> None:
    other = SHARED.replace("64L", "32L")
    text = library_source([KernelSource("a", ARGUMENTS, SHARED), KernelSource("b", ARGUMENTS, other)])
    assert text.count("#include <torch/csrc/inductor/cpp_prefix.h>") == 1
    assert text.index("#include <torch/csrc") < text.index("namespace kernel_0") < text.index("namespace kernel_1")


def test_a_piece_has_only_its_own_kernels_below_their_names() -> None:
    """Twins are one body with two names; what another piece of the build put in is left out."""
    other = SHARED.replace("16L", "8L")
    built = library_source([KernelSource(name, ARGUMENTS, SHARED if name != "b" else other) for name in "abc"])
    text = only_kernels(built, {"b": "cpp_fused_0"})
    assert "// cpp_fused_0\nnamespace kernel_1 {\n" in text and "namespace kernel_0" not in text
    assert text.count("METH_FASTCALL, nullptr}") == 1 and '{"b", ' in text
    assert only_kernels(built, {"a": "one", "c": "two"}).count("// one, two\nnamespace kernel_0 {") == 1
    assert only_kernels(built, {"a": "one", "b": "two", "c": "three"}).replace("// one, three\n", "") == built.replace(
        "namespace kernel_1", "// two\nnamespace kernel_1"
    )
