"""Recordings as CUDA graphs: the kernels that a call launched, launched again by one call of the driver.

A call is run once as ever, for what only a first call does, and then captured, which runs nothing. All graphs of a
recorder share one pool of memory: what a graph doesn't return may be written by any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from onegraph.garbage import collected_later
from onegraph.ir.recording import NotRecordableError, RecordedStep
from onegraph.ops.library import function_of
from onegraph.targets.cpu.tape import kernels_recorded
from onegraph.torch_compat.recordable import CapturedOperators, checked, storage_key, tensors


class CudaGraphRecorder:
    """Implements `ir.recording.Recorder`, for the current device."""

    def __init__(self) -> None:
        self._stream: Any = None
        self._pool: Any = None

    def record(self, run: Callable[[], Any], inputs: Sequence[torch.Tensor]) -> tuple[CudaGraphRecording, Any]:
        """As Recorder.record. `run` is called twice, and what it does on the device is done once."""
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        first = tensors(self._run_once(run))
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                collected_later(),  # a tensor that is freed by chance would end the capture
                torch.cuda.stream(torch.cuda.current_stream()),  # a capture that fails leaves its own behind
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                before = torch.cuda.memory_reserved()
                result = run()
                num_bytes = torch.cuda.memory_reserved() - before
        except RuntimeError as error:  # leaving the capture fails too, after what failed inside
            words = str(error.__context__ or error).strip().splitlines() or [type(error).__name__]
            raise NotRecordableError("not_capturable", "a CUDA graph", f"can't hold it: {words[0]}") from error
        results = tensors(result)
        with torch.inference_mode():
            for captured, ran in zip(results, first, strict=True):
                if captured.data_ptr() != ran.data_ptr():
                    captured.copy_(ran)
        theirs = {storage_key(one) for one in inputs if one.layout == torch.strided}
        kept = tuple(one for one in results if storage_key(one) not in theirs)
        return CudaGraphRecording(graph, kept, max(0, num_bytes)), result

    def _run_once(self, run: Callable[[], Any]) -> Any:
        """On the stream of captures. Raises NotRecordableError for what the capture would leave out, or end at."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        watch = CapturedOperators(lambda op: function_of(op, "CUDA"), "cuda")
        on_host: list[Any] = []
        try:
            with torch.cuda.stream(self._stream), kernels_recorded(on_host), checked(watch):
                result = run()
        finally:
            current.wait_stream(self._stream)
        if watch.refused is not None:
            raise watch.refused
        if on_host:
            raise NotRecordableError("host_code", on_host[0][0], "runs on the host, which a replay doesn't do")
        return result


class CudaGraphRecording:
    """Implements `ir.recording.Recording`. A replay is on the current stream."""

    steps: tuple[RecordedStep, ...] = ()

    def __init__(self, graph: Any, kept: tuple[torch.Tensor, ...], num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._graph = graph
        self._kept = kept

    def replay(self) -> None:
        """As Recording.replay."""
        self._graph.replay()
