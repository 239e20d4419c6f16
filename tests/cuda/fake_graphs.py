"""CUDA graphs without a GPU: what `targets/cuda/graphs.py` calls of torch.cuda, on CPU tensors, under the same names.

A capture notes the operators and kernels of its thread as the kernel tape does. As on a GPU it runs nothing: what was
written is put back, and what was made is filled with bytes that are no number. A replay does the work. Rules that the
driver has are errors here too: no capture on the default stream, no wait for the device inside of one.
"""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from onegraph.ops.library import function_of
from onegraph.targets.cpu.tape import KernelCall, TapeRecording, kernels_recorded
from onegraph.targets.cuda.breaks import EagerCall
from onegraph.targets.cuda.graphs import CudaGraphRecorder
from onegraph.torch_compat import recorded_ops
from onegraph.torch_compat.recordable import checked, refuse_unrepeatable, storage_key, tensors
from onegraph.torch_compat.recorded_ops import OperatorCall, RecordedOperators


class FakeStream:
    """A name, and what it has waited for."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def wait_stream(self, stream: FakeStream) -> None:
        self._cuda.log.append("wait_stream")


class Watch(RecordedOperators):
    """As the tape's, with random numbers, and with what operators write put back by `undo`."""

    def __init__(self, calls: list[Any], inputs: Sequence[torch.Tensor]) -> None:
        super().__init__(calls, inputs, lambda op: function_of(op, "CPU"), "cpu", lambda op: False)
        self._before: dict[int, tuple[Any, Any]] = {}
        for one in inputs:
            self.keep(one)

    def keep(self, tensor: torch.Tensor) -> None:
        key = storage_key(tensor)
        if key not in self._before and key not in self._made:
            self._before[key] = tensor.untyped_storage(), tensor.untyped_storage().clone()

    def refuse(self, func: Any, args: Any, kwargs: Any) -> None:
        refuse_unrepeatable(func, args, kwargs, draws=True)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        for one in tensors((args, kwargs)):
            self.keep(one)
        return super().call(func, args, kwargs)

    def undo(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)
        for key, storage in self._made.items():
            if key not in self._constants:
                storage.fill_(0xFF)
        self._before.clear()


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._work: TapeRecording | None = None
        self._alive: list[StorageWeakRef] = []
        self.made: dict[int, Any] = {}
        self.broken = False

    def pool(self) -> Any:
        return self._pool

    def capture_begin(
        self, pool: Any = None, capture_error_mode: str = "global", check_input_liveness: bool = False
    ) -> None:
        if self._cuda.current_stream() is self._cuda.default_stream:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self._pool, self.mode, self.thread = pool, capture_error_mode, threading.get_ident()
        self._checks_liveness = check_input_liveness
        self._calls: list[Any] = []
        self._random = torch.get_rng_state()
        self._watch = Watch(self._calls, self._cuda.inputs)
        self._open = ExitStack()
        self._open.enter_context(kernels_recorded(self._calls))
        recorded_ops._recording[self.thread] = self._watch
        self._open.callback(recorded_ops._recording.pop, self.thread)
        self._open.enter_context(checked(self._watch))
        self._cuda.capturing = self
        self._cuda.log.append("capture_begin")

    def num_bytes(self) -> int:
        made = self._watch._made if self._cuda.capturing is self else self.made
        return sum(one.nbytes() for one in made.values())

    def capture_end(self) -> None:
        self._cuda.capturing = None
        self._cuda.log.append("capture_end")
        self._open.close()
        self._watch.undo()
        torch.set_rng_state(self._random)
        if self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        calls = [one if isinstance(one, OperatorCall) else KernelCall(*one) for one in self._calls]
        self._work = TapeRecording(calls, self._watch, [])
        self._alive = [StorageWeakRef(one) for one in self._watch._inputs.values()]
        self.made = {key: one for key, one in self._watch._made.items() if key not in self._watch._constants}
        self._watch.forget()
        self._calls.clear()  # they hold the inputs
        self._cuda.graphs.append(self)

    def replay(self) -> None:
        dead = sum(one.expired() for one in self._alive) if self._checks_liveness else 0
        if dead:
            raise RuntimeError(f"CUDA graph replay detected {dead} dead tensor(s).\n")
        assert self._work is not None
        self._cuda.log.append("replay")
        self._work.replay()


class Capture:
    """Stands for torch.cuda.graph, and does what that does in its order."""

    def __init__(
        self,
        cuda_graph: FakeGraph,
        pool: Any = None,
        stream: Any = None,
        capture_error_mode: str = "global",
        enable_annotations: bool = False,
        check_input_liveness: bool = False,
    ) -> None:
        self.cuda_graph, self.pool, self.capture_stream = cuda_graph, (pool,), stream
        self.capture_error_mode, self.check_input_liveness = capture_error_mode, check_input_liveness
        self.stream_ctx = cuda_graph._cuda.stream(stream)

    def __enter__(self) -> None:
        self.cuda_graph._cuda.synchronize()
        self.stream_ctx.__enter__()
        self.cuda_graph.capture_begin(*self.pool, self.capture_error_mode, self.check_input_liveness)

    def __exit__(self, *error: Any) -> None:
        self.cuda_graph.capture_end()
        self.stream_ctx.__exit__(*error)


class CaptureOf211(Capture):
    """As torch 2.11 has it."""

    def __init__(
        self, cuda_graph: FakeGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> None:
        super().__init__(cuda_graph, pool, stream, capture_error_mode)


class FakeCuda:
    """Stands for the module torch.cuda. `log` names what was done, in order."""

    graph: Any = Capture

    def __init__(self) -> None:
        self.log: list[str] = []
        self.graphs: list[FakeGraph] = []
        self.capturing: FakeGraph | None = None
        self.inputs: Sequence[torch.Tensor] = ()
        self.returned: set[int] = set()
        self.default_stream = FakeStream(self)
        self._current = threading.local()
        self._pools = itertools.count(1)
        self._on_host: list[Any] | None = None

    def Stream(self) -> FakeStream:  # noqa: N802 - torch's name
        return FakeStream(self)

    def CUDAGraph(self) -> FakeGraph:  # noqa: N802 - torch's name
        return FakeGraph(self)

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, next(self._pools))

    def current_stream(self) -> FakeStream:
        found: FakeStream = getattr(self._current, "stream", self.default_stream)
        return found

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before = self.current_stream()
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    def synchronize(self) -> None:
        graph = self.capturing
        if graph is not None and (graph.thread == threading.get_ident() or graph.mode == "global"):
            graph.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore words")
        self.log.append("synchronize")

    def memory_reserved(self) -> int:
        """A pool is as large as the graph in it that takes most."""
        graphs = [*self.graphs, *([] if self.capturing is None else [self.capturing])]
        pools = {graph.pool() for graph in graphs}
        return sum(max(graph.num_bytes() for graph in graphs if graph.pool() == pool) for pool in pools)

    def memory_snapshot(self, mempool_id: Any = None) -> list[dict[str, Any]]:
        """One segment with a block for all memory that graphs of the pool have made."""
        blocks = [
            {
                "address": storage.data_ptr(),
                "size": storage.nbytes(),
                "state": "active_allocated" if key in self.returned else "inactive",
            }
            for graph in self.graphs
            if graph.pool() == mempool_id
            for key, storage in graph.made.items()
            if storage.nbytes()
        ]
        return [{"device": 0, "blocks": blocks}]

    @contextmanager
    def host_kernels(self, calls: list[Any]) -> Iterator[None]:
        """Stands for what hears of compiled C++ kernels, which are the host's beside a GPU."""
        self._on_host = calls
        try:
            yield
        finally:
            self._on_host = None

    def run_on_host(self, name: str) -> None:
        """What such a kernel does while it is recorded."""
        if self._on_host is not None:
            self._on_host.append((name, 0, b"", ()))


class FakeRecorder(CudaGraphRecorder):
    """The recorder itself, for tensors of the CPU. `cuda` is told what a driver knows: whose memory is whose."""

    device_type = "cpu"
    dispatch_key = "CPU"
    cuda: FakeCuda

    def record(self, run: Any, inputs: Sequence[torch.Tensor]) -> Any:
        self.cuda.inputs = inputs
        recording, result = super().record(run, inputs)
        held = [*recording._held[0]]
        for part in recording._parts:
            if isinstance(part, EagerCall):
                held += tensors((part._args, part._kwargs, part._statics))
        self.cuda.returned |= {storage_key(one) for one in held}
        self.cuda.inputs = ()
        return recording, result


class Watched:
    """A torch.cuda, real or not, that notes the captures: with what, and what the process did meanwhile."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.captures: list[dict[str, Any]] = []
        watched = self

        class Graph(cuda.graph):  # type: ignore[misc]
            """torch's own, noted."""

            __init__ = cuda.graph.__init__  # with its signature

            def __enter__(self) -> None:
                super().__enter__()
                watched.captures.append({**vars(self), "gc": gc.isenabled()})

        self.graph = Graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cuda, name)
