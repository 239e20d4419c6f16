"""The kernel tape: a replay does what a call did, bit for bit, and what it can't repeat is refused."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import onegraph
from onegraph.ir.recording import NotRecordableError
from onegraph.ir.target import KernelSource
from onegraph.ops import library
from onegraph.ops.library import implementation
from onegraph.targets.cpu import tape
from onegraph.targets.cpu.library import library_source
from onegraph.targets.cpu.target import LIBRARY, CpuTarget
from onegraph.torch_compat import toolchain
from onegraph.torch_compat.operators import dispatcher_is_watched
from tests.compiled_parts import plan_call
from tests.pipeline.test_kv_cache import attention_layers
from tests.pipeline.test_kv_cache import inputs as attention_inputs
from tests.pipeline.test_linear import GatedLayers
from tests.pipeline.test_plan_memory import ROWS, WIDTH, Tower, allocations

SCALE = KernelSource(
    name="scale",
    argtypes=("const float*", "float*", "const int64_t", "const double", "const bool"),
    source="""
extern "C"  void  kernel(const float* in_ptr0, float* out_ptr0, const int64_t ks0, const double by, const bool negate)
{
    for (int64_t x0 = 0; x0 < ks0; x0++) out_ptr0[x0] = in_ptr0[x0] * (negate ? -by : by);
}
""",
)
NUMBERS = KernelSource(
    name="numbers",
    argtypes=("double*", "const float", "const int64_t", "const int32_t", "const uint64_t", "const bool"),
    source="""
extern "C"  void  kernel(double* out, const float a, const int64_t b, const int32_t c, const uint64_t d, const bool e)
{
    out[0] = a; out[1] = b; out[2] = c; out[3] = d >> 1; out[4] = e;
}
""",
)
REFUSE = KernelSource(
    name="refuse",
    argtypes=("const float*",),
    source="""
#include <stdexcept>
extern "C"  void  kernel(const float* in_ptr0)
{
    if (in_ptr0[0] < 0) throw std::out_of_range("it is below zero");
}
""",
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Callable[..., None]]:
    folder = tmp_path_factory.mktemp("kernels")
    source = folder / "kernels.cpp"
    source.write_text(library_source([SCALE, NUMBERS, REFUSE]))
    command, built = toolchain.compile_command([str(source)], "kernels", folder)
    subprocess.run(command, check=True, cwd=folder)
    return CpuTarget().load_kernels({LIBRARY: built})


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
    assert not tape._tape.calls  # nothing is left recording


def record(run: Callable[[], Any], *inputs: torch.Tensor) -> tuple[tape.TapeRecording, Any]:
    return tape.TapeRecorder().record(run, inputs)


def names(recording: tape.TapeRecording) -> list[str]:
    return [step.name for step in recording.steps]


def refused(run: Callable[[], Any], *inputs: torch.Tensor) -> tuple[str, str]:
    with pytest.raises(NotRecordableError) as caught:
        record(run, *inputs)
    return caught.value.code, caught.value.op


class TestKernels:
    def test_are_replayed_on_the_same_memory(self, kernels: Mapping[str, Any]) -> None:
        x, middle, out = torch.arange(4.0), torch.zeros(4), torch.zeros(4)

        def run() -> torch.Tensor:
            kernels["scale"](x, middle, 4, 2.5, False)
            kernels["scale"](middle, out, 3, 2.0, True)
            return out

        recording, result = record(run, x)
        assert result is out and out.tolist() == [0, -5, -10, 0]
        assert names(recording) == ["scale", "scale"] and recording.num_bytes == 0
        for value in (3.0, -1.0):
            x.fill_(value)
            recording.replay()
            assert out.tolist() == [value * -5] * 3 + [0]

    def test_numbers_of_all_kinds_are_kept(self, kernels: Mapping[str, Any]) -> None:
        out = torch.zeros(5, dtype=torch.float64)
        given = (0.1, -(1 << 50), -7, (1 << 64) - 2, True)
        recording, _ = record(lambda: kernels["numbers"](out, *given), out)
        expected = out.clone()
        assert expected.tolist() == [pytest.approx(0.1), -(1 << 50), -7, float(1 << 63), 1]
        out.zero_()
        recording.replay()
        assert torch.equal(out, expected)

    def test_stand_between_operators_in_their_order(self, kernels: Mapping[str, Any]) -> None:
        x, out = torch.ones(4), torch.zeros(4)

        def run() -> torch.Tensor:
            kernels["scale"](x, out, 4, 2.0, False)
            out.add_(1)
            kernels["scale"](out, out, 4, 3.0, False)
            out.view(2, 2).mul_(out.view(2, 2))
            return out

        recording, _ = record(run, x)
        assert names(recording) == ["scale", "aten.add_.Tensor", "scale", "aten.mul_.Tensor"]
        x.fill_(5)
        recording.replay()
        assert out.tolist() == [33.0**2] * 4

    def test_of_other_threads_are_not_recorded(self, kernels: Mapping[str, Any]) -> None:
        x, out, other = torch.ones(4), torch.zeros(4), torch.zeros(4)

        def run() -> None:
            thread = threading.Thread(target=lambda: (kernels["scale"](x, other, 4, 7.0, False), other.add_(1)))
            thread.start()
            thread.join()
            kernels["scale"](x, out, 4, 2.0, False)

        recording, _ = record(run, x)
        assert names(recording) == ["scale"] and other.tolist() == [8.0] * 4
        recording.replay()
        assert other.tolist() == [8.0] * 4

    def test_a_replay_in_another_thread(self, kernels: Mapping[str, Any]) -> None:
        x, out, weight = torch.ones(4, 4), torch.zeros(4, 4), torch.randn(4, 4)

        def run() -> torch.Tensor:
            kernels["scale"](x, out, 16, 2.0, False)
            return torch.mm(out, weight)

        recording, result = record(run, x)
        x.fill_(3)
        found: list[Any] = []

        def replay() -> None:
            torch.set_num_threads(1)
            recording.replay()
            found.append(torch.get_num_threads())

        thread = threading.Thread(target=replay)
        thread.start()
        thread.join()
        assert torch.equal(result, run()) and found == [1]

    def test_what_fails_in_a_replay_is_named(self, kernels: Mapping[str, Any]) -> None:
        x, out = torch.ones(4), torch.zeros(4)

        def run() -> None:
            kernels["scale"](x, out, 4, 2.0, False)
            kernels["refuse"](x)
            kernels["scale"](x, out, 4, 3.0, False)

        recording, _ = record(run, x)
        x.fill_(-1)
        with pytest.raises(RuntimeError, match="kernel refuse failed in a replay: it is below zero"):
            recording.replay()
        assert out.tolist() == [-2.0] * 4
        x.fill_(1)
        recording.replay()
        assert out.tolist() == [3.0] * 4

    def test_what_raises_is_raised_and_leaves_nothing_recording(self, kernels: Mapping[str, Any]) -> None:
        x, out = -torch.ones(4), torch.zeros(4)
        with pytest.raises(RuntimeError, match="it is below zero"):
            record(lambda: kernels["refuse"](x), x)
        with pytest.raises(TypeError, match="integer"):
            record(lambda: kernels["scale"](x, out, "4", 2.0, False), x)
        with pytest.raises(ZeroDivisionError):
            record(lambda: (kernels["scale"](x, out, 4, 2.0, False), 1 / 0), x)
        recording, _ = record(lambda: kernels["scale"](x, out, 4, 2.0, False), x)
        assert names(recording) == ["scale"] and not dispatcher_is_watched()

    def test_one_recording_inside_of_another_is_a_mistake(self) -> None:
        with pytest.raises(AssertionError, match="inside of another"):
            record(lambda: record(lambda: None))

    def test_recordings_of_two_threads_take_turns(self, kernels: Mapping[str, Any]) -> None:
        x, outs, found = torch.ones(4), [torch.zeros(4) for _ in range(4)], {}

        def make(number: int) -> None:
            def run() -> None:
                for _ in range(50):
                    kernels["scale"](x, outs[number], 4, float(number), False)

            found[number], _ = record(run, x)

        threads = [threading.Thread(target=make, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        x.fill_(2)
        for number, recording in found.items():
            assert len(recording.steps) == 50
            recording.replay()
            assert outs[number].tolist() == [2.0 * number] * 4

    def test_a_replay_allocates_nothing(self, kernels: Mapping[str, Any]) -> None:
        x, out = torch.ones(4), torch.zeros(4)
        recording, _ = record(lambda: [kernels["scale"](x, out, 4, 2.0, False) for _ in range(20)], x)
        assert allocations(recording.replay) == []


class TestOperators:
    def test_are_run_again_on_the_same_tensors(self) -> None:
        x, weight, table = torch.randn(6, 8), torch.randn(8, 8), torch.randn(10, 8)
        ids = torch.arange(6)

        def run() -> tuple[torch.Tensor, ...]:
            product = torch.mm(x, weight)
            torch.add(product, 1, out=(given := torch.empty(0)))
            turned = given.t().reshape(-1)
            values, indices = product.topk(3, -1)
            rows = table[ids].softmax(-1)
            rows[1:3] = 4
            rows[:, ids[:2]] += rows[0, 0]
            sums = torch.zeros(8).index_add_(0, ids % 8, rows[:, 0])
            joined = torch.cat([rows.unsqueeze(0), x[None] * torch.tensor([2.0])]).sum(0)
            norm = torch.nn.functional.layer_norm(joined.to(torch.float64), [8])
            return product, turned, values, indices, rows, sums, joined, norm, given[1:]

        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                recording, results = record(run, x, ids)
            for seed in (1, 2):
                generator = torch.Generator().manual_seed(seed)
                x.copy_(torch.randn(6, 8, generator=generator))
                ids.copy_(torch.randint(0, 8, (6,), generator=generator))
                recording.replay()
                for found, expected in zip(results, run(), strict=True):
                    assert torch.equal(found, expected)

    def test_without_memory_of_their_own_where_they_have_an_overload_for_it(self) -> None:
        x = torch.randn(64, 64)
        recording, result = record(lambda: (x @ x).relu().view(-1)[:100], x)
        assert names(recording) == ["aten.mm.default", "aten.relu.default"]
        assert allocations(recording.replay) in ([], [64 * 64 * 4])  # relu's is generated: a copy
        x.mul_(-1)
        recording.replay()
        assert torch.equal(result, (x @ x).relu().view(-1)[:100])

    def test_views_and_allocations_are_no_steps(self) -> None:
        x = torch.randn(4, 4)
        recording, (view, empty) = record(lambda: (x.t()[1:].unsqueeze(0).chunk(2, -1)[0], torch.empty(5)), x)
        assert recording.steps == () and recording.num_bytes == 20
        assert view.data_ptr() == x[0, 1:].data_ptr() and empty.shape == (5,)

    def test_values_that_the_host_gave_are_put_back(self) -> None:
        x = torch.ones(2)

        def run() -> torch.Tensor:
            sums = torch.tensor([1.0, 2.0])
            sums += x
            return sums

        recording, result = record(run, x)
        for _ in range(3):
            recording.replay()
        assert result.tolist() == [2.0, 3.0]

    def test_shapes_that_change_later_do_not_reach_back(self) -> None:
        x = torch.arange(6.0)

        def run() -> torch.Tensor:
            made = x.view(2, 3) + 1
            made.t_()
            return made

        recording, result = record(run, x)
        x.mul_(2)
        recording.replay()
        assert torch.equal(result, (x.view(2, 3) + 1).t())

    def test_autograd_and_autocast_of_the_caller_are_left_out(self) -> None:
        x, weight = torch.randn(4, 4), torch.nn.Parameter(torch.randn(4, 4))
        recording, result = record(lambda: torch.mm(x, weight) + weight, x, weight)
        x.mul_(2)
        with torch.enable_grad(), torch.autocast("cpu"):
            recording.replay()
        assert torch.equal(result, torch.mm(x, weight) + weight) and not result.requires_grad

    def test_of_others_in_cpp_are_run_again(self) -> None:
        """oneDNN's linear has no overload for given memory."""
        x, weight = torch.randn(3, 8), torch.randn(4, 8)
        linear = torch.ops.mkldnn._linear_pointwise
        recording, result = record(lambda: linear(x, weight, None, "none", [], ""), x, weight)
        assert names(recording) == ["mkldnn._linear_pointwise.default"]
        x.mul_(2)
        recording.replay()
        assert torch.equal(result, linear(x, weight, None, "none", [], ""))

    def test_attention_without_dropout_draws_nothing(self) -> None:
        q = torch.randn(1, 2, 3, 8)
        attend = torch.nn.functional.scaled_dot_product_attention
        recording, result = record(lambda: attend(q, q, q), q)
        q.add_(1)
        recording.replay()
        assert torch.equal(result, attend(q, q, q))
        assert refused(lambda: attend(q, q, q, dropout_p=0.5), q)[0] == "random"


def python_op(name: str, tags: tuple[torch.Tag, ...] = ()) -> Any:
    made = torch.library.Library("onegraph_test_tape", "FRAGMENT")
    made.define(f"{name}(Tensor x) -> Tensor", tags=tags)
    made.impl(name, lambda x: x + 1, "CPU")
    return made, getattr(torch.ops.onegraph_test_tape, name)


class TestRefusals:
    X = torch.arange(4.0)

    @pytest.mark.parametrize(
        ("code", "run"),
        [
            ("host_read", lambda x: x.sum().item()),
            ("host_read", lambda x: bool(x[0] > 0)),
            ("host_read", lambda x: torch.equal(x, x)),
            ("host_read", lambda x: torch.allclose(x, x)),
            ("host_read", lambda x: x.tolist()),
            ("host_read", lambda x: x.numpy()),
            ("random", lambda x: torch.rand(3)),
            ("random", lambda x: x.clone().bernoulli_(0.5)),
            ("random", lambda x: torch.dropout(x, 0.5, True)),
            ("random", lambda x: torch.randint(0, 10, (1,), out=torch.empty(1, dtype=torch.int64))),
            ("data_dependent_shape", lambda x: x.nonzero()),
            ("data_dependent_shape", lambda x: x[x > 1]),
            ("data_dependent_shape", lambda x: torch.unique(x)),
            ("data_dependent_shape", lambda x: torch.nonzero(x, out=torch.empty(0, dtype=torch.int64))),
            ("moved_memory", lambda x: torch.add(x, 1, out=torch.ones(2).resize_(9).resize_(2).resize_(100))),
            ("unsafe_op", lambda x: x.to_sparse()),
        ],
    )
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_what_a_replay_cannot_repeat(self, code: str, run: Any, mode: Any) -> None:
        with mode():
            assert refused(lambda: run(self.X), self.X)[0] == code

    def test_nothing_has_run_when_an_operator_is_refused(self) -> None:
        state = torch.random.get_rng_state()
        refused(lambda: self.X.clone().uniform_())
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_ops_in_python(self) -> None:
        kept, op = python_op("in_python")
        assert refused(lambda: op(self.X), self.X) == ("host_code", "onegraph_test_tape.in_python.default")

        @torch.library.custom_op("onegraph_test_tape::custom", mutates_args=())
        def custom(x: torch.Tensor) -> torch.Tensor:
            return x + 1

        assert refused(lambda: custom(self.X), self.X) == ("host_code", "onegraph_test_tape.custom.default")
        del kept

    def test_ops_that_say_that_they_are_unsafe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kept, op = python_op("unsafe", (torch.Tag.cudagraph_unsafe,))
        monkeypatch.setattr("onegraph.torch_compat.recorded_ops.runs_python", lambda func: False)
        monkeypatch.setattr("onegraph.torch_compat.recordable.runs_python", lambda func: False)
        assert refused(lambda: op(self.X), self.X)[0] == "unsafe_op"
        del kept

    def test_also_where_the_caller_goes_on(self) -> None:
        def run() -> None:
            for read in (lambda: self.X.tolist(), lambda: self.X.sum().item()):
                with contextlib.suppress(Exception):
                    read()

        assert refused(run, self.X) == ("host_read", "Tensor.tolist")

    @pytest.mark.usefixtures("op_kernels")
    def test_a_reference_that_reads_values(self) -> None:
        given = {name: one for name, one in attention_inputs(3).items() if name != "kv_caches"}
        q = given["x"].double().view(3, 2, 8)
        cache = torch.zeros(16, 4, 2, 8, dtype=torch.float64)
        args = (q, cache, cache, given["block_tables"], given["query_start_loc"], given["seq_lens"])
        code, op = refused(lambda: torch.ops.onegraph.paged_attention(*args, 1.0, None, None, None), *args)
        assert (code, op) == ("host_read", "Tensor.tolist")


class TestMemory:
    def test_inputs_are_not_kept_alive(self, kernels: Mapping[str, Any]) -> None:
        def made() -> tuple[tape.TapeRecording, list[StorageWeakRef]]:
            x, out = torch.ones(4), torch.zeros(4)

            def run() -> tuple[torch.Tensor, ...]:
                kernels["scale"](x, out, 4, 2.0, False)
                square = x.view(2, 2)
                return torch.add(out, x), square, torch.mm(square, square.t(), out=torch.empty(2, 2))

            recording, _ = record(run, x)
            recording.replay()
            return recording, [StorageWeakRef(one.untyped_storage()) for one in (x, out)]

        recording, storages = made()
        assert names(recording) == ["scale", "aten.add.Tensor", "aten.mm.out"]
        gc.collect()
        assert [one.expired() for one in storages] == [True, False]
        del recording
        assert storages[1].expired()

    def test_what_was_made_is_counted_and_kept(self, kernels: Mapping[str, Any]) -> None:
        x, before = torch.ones(100), torch.zeros(100)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            made = torch.empty(100)
            kernels["scale"](x, made, 100, 2.0, False)
            kernels["scale"](made, before, 100, 2.0, False)
            return torch.empty(7), made[:10] + before[:10]

        recording, results = record(run, x)
        assert [step.num_bytes for step in recording.steps] == [400, 0, 40]
        assert recording.num_bytes == 400 + 40 + 28
        storage = StorageWeakRef(results[0].untyped_storage())
        del results
        assert not storage.expired()
        x.fill_(3)
        recording.replay()
        assert before.tolist() == [12.0] * 100


class Elsewhere(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_own_ops_need_no_dispatcher_where_only_a_recording_looks_on() -> None:
    seen: list[bool] = []

    def run() -> None:
        seen.append(dispatcher_is_watched())
        with Elsewhere():
            seen.append(dispatcher_is_watched())

    record(run)
    with Elsewhere():
        record(run)
    assert seen == [False, True, True, True]


def replays_like_a_call(model: Any, *args: Any, state: tuple[torch.Tensor, ...] = (), **kwargs: Any) -> list[str]:
    """Records a call, changes all inputs in place, and compares a replay with a call to the bit; gives the steps."""
    for _ in range(2):
        model(*args, **kwargs)
    plan, given = plan_call(model, *args, **kwargs)
    tensors = [one for one in given if isinstance(one, torch.Tensor)]
    recording, results = record(lambda: plan(*given), *tensors)
    floats = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if one.is_floating_point()]
    for seed in (1, 2):
        for one in floats:
            one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(seed)))
        states = [one.clone() for one in floats]
        expected = [one.clone() for one in plan(*given)]
        after = [one.clone() for one in floats]
        for one, value in zip(floats, states, strict=True):
            one.copy_(value)
        for one in results:
            one.zero_()
        recording.replay()
        assert all(map(torch.equal, results, expected)) and all(map(torch.equal, floats, after))
    return names(recording)


@pytest.mark.usefixtures("op_kernels")
class TestCompiled:
    def test_inductors_kernels_and_mm(self) -> None:
        model = onegraph.compile(
            Tower(),
            dynamic_shapes=ROWS,
            config={"splitting_ops": ["torch.relu"], "passes": {"select_linear_kernels": False}},
        )
        found = replays_like_a_call(model, torch.randn(5, WIDTH))
        assert sum(name.startswith("kernel_") for name in found) == 6
        assert found.count("aten.addmm.out") == 6 and found.count("aten.relu.default") == 3

    def test_linear(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            model = onegraph.compile(GatedLayers(dtype), dynamic_shapes={"x": {1: Dim("tokens", min=1, max=64)}})
            found = replays_like_a_call(model, torch.randn(1, 1, 32).to(dtype))
            assert sum(name.startswith("linear_") for name in found) == 5
            assert not any(name.startswith(("aten.", "onegraph.")) for name in found)

    @pytest.mark.parametrize("config", [{}, {"splitting_ops": []}, {"backend": "eager"}], ids=str)
    def test_attention(self, config: dict[str, Any]) -> None:
        tokens = Dim("num_tokens", min=1, max=16)
        shapes = {"x": {0: tokens}, "slot_mapping": {0: tokens}}
        model = onegraph.compile(attention_layers, dynamic_shapes=shapes, config=config)
        found = replays_like_a_call(model, **attention_inputs(5))
        assert found.count("paged_attention") == found.count("write_kv_cache") == 3
        assert ("aten.mul.Tensor" in found) == (config == {"backend": "eager"})

    def test_rotary_and_the_write_of_the_cache(self) -> None:
        op = implementation("rotary_write_kv_cache", "CPU")
        assert op is not None
        q, k, v = torch.randn(3, 4, 8), torch.randn(3, 2, 8), torch.randn(3, 2, 8)
        cos, sin, slots = torch.randn(3, 8), torch.randn(3, 8), torch.tensor([1, -1, 6])
        caches = [torch.zeros(4, 4, 2, 8) for _ in range(2)]
        args = (q, k, v, cos, sin, *caches, slots)
        for call in (op, torch.ops.onegraph.rotary_write_kv_cache):
            recording, result = record(lambda call=call: call(*args), *args)
            assert names(recording) == ["rotary"] and recording.num_bytes == q.nbytes
            for one in (q, k, v):
                one.copy_(torch.randn_like(one))
            slots.copy_(torch.tensor([3, 4, -1]))
            before = [one.clone() for one in caches]
            expected = [op(*args).clone(), *(one.clone() for one in caches)]
            for one, value in zip(caches, before, strict=True):
                one.copy_(value)
            result.zero_()
            recording.replay()
            assert all(map(torch.equal, (result, *caches), expected))

    def test_what_leaves_the_call_is_counted(self) -> None:
        model = onegraph.compile(torch.nn.Softmax(-1), dynamic_shapes={"input": {0: Dim("rows", min=1, max=64)}})
        x = torch.randn(5, 64)
        for _ in range(2):
            model(x)
        plan, given = plan_call(model, x)
        recording, _ = record(lambda: plan(*given), x)
        assert recording.num_bytes == x.nbytes


def test_a_planned_call_is_replayed_without_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "dispatcher_is_watched", lambda: False)
    model = onegraph.compile(lambda x: (x.sin() * 2).softmax(-1), dynamic_shapes=ROWS)
    x = torch.randn(5, WIDTH)
    for _ in range(2):
        model(x)
    plan, given = plan_call(model, x)
    recording, _ = record(lambda: plan(*given), x)
    assert recording.steps and allocations(recording.replay) == []
