"""The kernel tape: what a call did, kernel by kernel, done again on the same memory without its Python code.

All libraries of kernels look at one structure, the tape: while a thread records, each of its kernels runs as always and
appends its name, its arguments as words, and the tensors among them. Between kernels stand the operators that went
through torch's dispatcher. A replay is one C call for each run of kernels, and one Python call for each operator.

Numbers of threads, and whatever else the host decided, are as they were when it was recorded.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from onegraph.ir.recording import RecordedStep, Turn
from onegraph.ops.library import decides_by_values, function_of
from onegraph.torch_compat.recordable import storage_key, tensors
from onegraph.torch_compat.recorded_ops import (
    OperatorCall,
    RecordedOperators,
    operators_recorded,
    without_autocast,
    without_autograd,
)

_WORD = ctypes.sizeof(ctypes.c_uint64)
_REASON_BYTES = 512
_Replay = ctypes.CFUNCTYPE(
    ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64
)  # without Python's lock


class _Tape(ctypes.Structure):
    """As in bindings.h."""

    _fields_ = (("calls", ctypes.c_void_p), ("thread", ctypes.c_ulong), ("replay", ctypes.c_void_p))


class _Call(ctypes.Structure):
    """`RecordedCall` of bindings.h."""

    _fields_ = (("run", ctypes.c_void_p), ("words", ctypes.c_void_p))


class KernelCall(NamedTuple):
    """A kernel's call as bindings.h appends it: `run` is a C function of the words."""

    name: str
    run: int
    words: bytes
    tensors: tuple[torch.Tensor, ...]


_tape = _Tape()
_lock = threading.Lock()


def tape_address() -> int:
    """Where libraries of kernels find the tape, for as long as the process lives."""
    return ctypes.addressof(_tape)


@contextmanager
def kernels_recorded(calls: list[Any]) -> Iterator[None]:
    """Inside, kernels that this thread calls append themselves to the list. One thread records at a time."""
    thread = threading.get_ident()
    assert not (_tape.calls and _tape.thread == thread), "a recording is made inside of another"
    with _lock:
        _tape.thread = thread
        _tape.calls = id(calls)
        try:
            yield
        finally:
            _tape.calls = None


class TapeRecorder:
    """Implements `ir.recording.Recorder`."""

    def __init__(self) -> None:
        self.turn = Turn()

    def record(self, run: Callable[[], Any], inputs: Sequence[torch.Tensor]) -> tuple[TapeRecording, Any]:
        """As Recorder.record."""
        calls: list[Any] = []
        with (
            kernels_recorded(calls),
            operators_recorded(calls, inputs, _own_function, "cpu", decides_by_values) as memory,
        ):
            result = run()
        if memory.refused is not None:  # and `run` went on
            raise memory.refused
        calls = [one if isinstance(one, OperatorCall) else KernelCall(*one) for one in calls]
        results = [one for one in tensors(result) if one.layout == torch.strided]
        try:
            return TapeRecording(calls, memory, results), result
        finally:
            memory.forget()


class TapeRecording:
    """Implements `ir.recording.Recording`. A replay raises RuntimeError with the name of the kernel that failed."""

    def __init__(
        self, calls: Sequence[KernelCall | OperatorCall], memory: RecordedOperators, results: Sequence[torch.Tensor]
    ) -> None:
        held: dict[int, torch.Tensor] = {}

        def hold(tensors: Sequence[torch.Tensor]) -> int:
            """Keeps the storages; gives the bytes of those that are new."""
            new = {storage_key(one): one for one in tensors if not memory.is_input(one)}
            new = {key: one for key, one in new.items() if key not in held}
            held.update(new)
            return sum(map(memory.made_bytes, new.values()))

        self.steps = tuple(RecordedStep(call.name, hold(call.tensors)) for call in calls)
        self.num_bytes = sum(step.num_bytes for step in self.steps) + hold(results)
        self._held = tuple(held.values())
        returned = {storage_key(one) for one in results}
        self._made = [
            one.untyped_storage() for key, one in held.items() if memory.is_scratch(one) and key not in returned
        ]
        self._num_threads = torch.get_num_threads()
        self._has_operators = any(isinstance(call, OperatorCall) for call in calls)
        self._parts: list[Callable[[], Any]] = []
        for is_kernel, part in itertools.groupby(calls, lambda call: isinstance(call, KernelCall)):
            if is_kernel:
                self._parts.append(_Kernels(list(part)))  # type: ignore[arg-type]
            else:
                self._parts += [call.run for call in part if isinstance(call, OperatorCall)]

    def replay(self) -> None:
        """As Recording.replay."""
        num_threads = torch.get_num_threads()
        if num_threads != self._num_threads:
            torch.set_num_threads(self._num_threads)
        try:
            if self._has_operators:
                with without_autograd(), without_autocast():
                    for part in self._parts:
                        part()
            else:
                for part in self._parts:
                    part()
        finally:
            if num_threads != self._num_threads:
                torch.set_num_threads(num_threads)

    def poison(self) -> None:
        """As Recording.poison: a replay writes all of it anew, before it reads it."""
        for storage in self._made:
            storage.fill_(0xFF)


class _Kernels:
    """Kernels in a row, in memory that C reads."""

    def __init__(self, calls: Sequence[KernelCall]) -> None:
        self._names = [call.name for call in calls]
        words = b"".join(call.words for call in calls)
        self._words = (ctypes.c_uint64 * (len(words) // _WORD + 1)).from_buffer_copy(words + bytes(_WORD))
        lengths = (len(call.words) for call in calls[:-1])
        begins = itertools.accumulate(lengths, initial=ctypes.addressof(self._words))
        self._calls = (_Call * len(calls))(*(_Call(call.run, begin) for call, begin in zip(calls, begins, strict=True)))
        self._reason = ctypes.create_string_buffer(_REASON_BYTES)
        self._replay = _Replay(_tape.replay)
        self._arguments = ctypes.addressof(self._calls), len(calls), ctypes.addressof(self._reason), _REASON_BYTES

    def __call__(self) -> None:
        done = self._replay(*self._arguments)
        if done < len(self._names):
            reason = self._reason.value.decode(errors="replace")
            raise RuntimeError(f"the kernel {self._names[done]} failed in a replay: {reason}")


def _own_function(op: Any) -> Callable[..., Any] | None:
    return None if decides_by_values(op) else function_of(op, "CPU")
