"""Recordings as CUDA graphs: the kernels that a call launched, launched again by one call of the driver.

A call is run once as ever, for what only a first call does, and then captured, which runs nothing. All graphs of a
recorder share one pool of memory: what a graph doesn't return may be written by any other. A call that has eager breaks
becomes several graphs, with the calls of these between them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import cuda

from onegraph.eager_breaks import breaks_heard_by
from onegraph.errors import RecordingError
from onegraph.garbage import collected_later
from onegraph.ir.recording import NotRecordableError, RecordedStep, Turn
from onegraph.ops.library import function_of
from onegraph.targets.cpu.tape import kernels_recorded
from onegraph.targets.cuda.breaks import EagerCall, FirstCall, Inputs, inputs_by_storage, named
from onegraph.torch_compat.raw_tensors import tensor_at
from onegraph.torch_compat.recordable import CapturedOperators, checked, storage_key, tensors

LIVENESS = "check_input_liveness"
"""What torch's capture calls its check that memory is still there at a replay; torch 2.11 has none."""


class CudaGraphRecorder:
    """Implements `ir.recording.Recorder`, for the current device.

    With `checks_liveness` torch looks at each replay whether the memory that a graph reads is still there, where its
    version can: that takes time for each tensor.
    """

    device_type = "cuda"
    dispatch_key = "CUDA"

    def __init__(self, *, checks_liveness: bool = False) -> None:
        self._checks_liveness = checks_liveness and LIVENESS in inspect.signature(cuda.graph).parameters
        self.turn = Turn()
        self._stream: Any = None
        self._pool: Any = None

    def record(self, run: Callable[[], Any], inputs: Sequence[torch.Tensor]) -> tuple[CudaGraphRecording, Any]:
        """As Recorder.record. `run` is called twice, and what it does on the device is done once."""
        if self._stream is None:
            self._stream, self._pool = cuda.Stream(), cuda.graph_pool_handle()
        breaks: list[FirstCall] = []
        watch = CapturedOperators(lambda op: function_of(op, self.dispatch_key), self.device_type, inputs)
        first = tensors(self._run_once(run, watch, breaks))
        used = watch.used_besides([*first, *(one for each in breaks for one in each.tensors())])
        capture = _Capture(self._graph, breaks, inputs_by_storage(inputs))
        result = capture.of(run)
        results = tensors(result)
        with torch.inference_mode():
            for captured, ran in zip(results, first, strict=True):
                if captured.data_ptr() != ran.data_ptr():
                    captured.copy_(ran)
        theirs = {storage_key(one) for one in inputs if one.layout == torch.strided}
        kept = tuple(one for one in results if storage_key(one) not in theirs)
        idle = torch.empty(0, dtype=torch.uint8, device=self.device_type)
        return CudaGraphRecording(capture.parts, (kept, used), capture.num_bytes, self._pool, idle), result

    def _run_once(self, run: Callable[[], Any], watch: CapturedOperators, breaks: list[FirstCall]) -> Any:
        """On the stream of captures. Raises NotRecordableError for what the capture would leave out, or end at."""
        current = cuda.current_stream()
        self._stream.wait_stream(current)
        on_host: list[Any] = []

        def run_break(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            before = len(on_host)
            with watch.paused(), breaks_heard_by(None):
                results = function(*args, **kwargs)
            del on_host[before:]
            try:
                breaks.append(FirstCall.of(function, args, kwargs, results))
            except NotRecordableError as error:
                watch.refused = watch.refused or error
                raise
            return results

        try:
            with (
                cuda.stream(self._stream),
                kernels_recorded(on_host),
                breaks_heard_by(run_break),
                checked(watch),
            ):
                result = run()
        finally:
            current.wait_stream(self._stream)
        if watch.refused is not None:
            raise watch.refused
        if on_host:
            raise NotRecordableError("host_code", on_host[0][0], "runs on the host, which a replay doesn't do")
        return result

    def _graph(self, graph: Any, *, is_alone: bool) -> AbstractContextManager[None]:
        """Inside, what this thread launches is captured. What other threads do meanwhile doesn't end it."""
        how: dict[str, Any] = {"capture_error_mode": "thread_local"}
        if self._checks_liveness and is_alone:  # memory of one graph, read by the next, may be free behind that
            how[LIVENESS] = True
        captures: AbstractContextManager[None] = cuda.graph(graph, pool=self._pool, stream=self._stream, **how)
        return captures


class _Capture:
    """One call as `parts`: graphs, and the calls between them. `breaks` are those of its first run."""

    def __init__(self, graph: Callable[..., Any], breaks: Sequence[FirstCall], inputs: Inputs) -> None:
        self.parts: list[Any] = []
        self.num_bytes = 0
        self._graph = graph
        self._breaks = breaks
        self._inputs = inputs
        self._done = 0
        self._reserved = 0
        self._open: Any = None
        self._refused: NotRecordableError | None = None

    def of(self, run: Callable[[], Any]) -> Any:
        """Calls `run` and captures it. Raises NotRecordableError for what the device refuses."""
        try:
            with (
                collected_later(),  # a tensor that is freed by chance would end the capture
                cuda.stream(cuda.current_stream()),  # a capture that fails leaves its own behind
                breaks_heard_by(self._at_break),
            ):
                self._begin()
                try:
                    result = run()
                except BaseException as error:
                    self._end(error)
                    raise
                self._end()
        except RuntimeError as error:  # leaving the capture fails too, after what failed inside
            words = str(error.__context__ or error).strip().splitlines() or [type(error).__name__]
            raise NotRecordableError("not_capturable", "a CUDA graph", f"can't hold it: {words[0]}") from error
        if self._refused is not None:  # and `run` went on
            raise self._refused
        if self._done != len(self._breaks):
            name = named(self._breaks[self._done].function)
            raise NotRecordableError("host_code", name, "isn't called the second time")
        return result

    def _begin(self) -> None:
        graph = cuda.CUDAGraph()
        opened = self._graph(graph, is_alone=not self._breaks)
        opened.__enter__()
        self._open = opened, graph
        self._reserved = cuda.memory_reserved()

    def _end(self, error: BaseException | None = None) -> None:
        if self._open is None:
            return
        (opened, graph), self._open = self._open, None
        self.num_bytes += max(0, cuda.memory_reserved() - self._reserved)
        opened.__exit__(None if error is None else type(error), error, None)
        self.parts.append(graph)

    def _at_break(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._end()
        try:
            if self._done == len(self._breaks) or self._breaks[self._done].function is not function:
                raise NotRecordableError("host_code", named(function), "isn't called the same way each time")
            results = self._breaks[self._done].results_of(args, kwargs)
        except NotRecordableError as error:
            self._refused = error
            raise
        self._done += 1
        self.parts.append(EagerCall(function, args, kwargs, results, self._inputs))
        self._begin()
        return results


class CudaGraphRecording:
    """Implements `ir.recording.Recording`. A replay is on the current stream; `held` is what it keeps alive."""

    def __init__(self, parts: Sequence[Any], held: Any, num_bytes: int, pool: Any, idle: torch.Tensor) -> None:
        self.num_bytes = num_bytes
        self.steps = tuple(RecordedStep(getattr(part, "name", "CUDA graph")) for part in parts)
        self._parts = parts
        self._replays = [part if isinstance(part, EagerCall) else part.replay for part in parts]
        self._held = held
        self._pool = pool
        self._idle = idle

    def replay(self) -> None:
        """As Recording.replay. Raises RecordingError where torch finds that memory is gone."""
        try:
            for replay in self._replays:
                replay()
        except RuntimeError as error:
            if "dead tensor" not in str(error):
                raise
            raise RecordingError(
                f"memory that the recording reads was freed: {str(error).splitlines()[0]}",
                where="a replay with cudagraph_check=always",
                hint="keep the tensor, or record again",
            ) from error

    def poison(self) -> None:
        """As Recording.poison: what the pool's graphs use, and no tensor holds."""
        for segment in cuda.memory_snapshot(self._pool):
            for block in segment["blocks"]:
                if block["state"] == "inactive":
                    tensor_at(block["address"], (block["size"],), self._idle).fill_(0xFF)
