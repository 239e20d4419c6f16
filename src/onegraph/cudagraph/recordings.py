"""The recordings of one graph, which stand before its plan's function and are called like it.

Takes a plan, its function, and a target's recorder. A call whose sizes were recorded is replayed: its inputs are in the
recording's memory already, or are copied there; any other call runs the plan, with a reason that is counted. Nothing is
recorded but what `record` is asked for.

A whole call can be recorded (FULL), for all of its sizes; or its compiled pieces (PIECEWISE), for the size of the first
declared dim, with the splitting ops between them run as ever.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from onegraph.config.compilation import CUDAGraphMode
from onegraph.config.resolve import ResolvedConfig
from onegraph.counters import counters
from onegraph.cudagraph.graph import RecordedGraph
from onegraph.cudagraph.manifest import Manifest, MemoryUse
from onegraph.cudagraph.pieces import ReplayedPiece, record_pieces
from onegraph.errors import RecordingError
from onegraph.ir.recording import NotRecordableError, RecordedSize, Recorder, Recording
from onegraph.ops.memory import same_bytes
from onegraph.plan.function import failed_piece, plan_function
from onegraph.plan.memory import Block, size_names

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE

_PUT_BACK = 1 << 26
"""Bytes of written memory that a comparison puts back; a KV cache is larger, and what is written there is the same."""


@dataclass
class _Recorded:
    """A recording that can be replayed: `replay(inputs)` does it, and gives the results in the recording's memory."""

    shown: RecordedSize
    replay: Callable[[tuple[Any, ...]], Sequence[Any]]
    manifest: Manifest
    statics: tuple[tuple[int, torch.Tensor, int], ...]
    """Step inputs: their index, the tensor that was recorded, and its address."""
    copies: bool
    """Whether step inputs that lie elsewhere may be copied in: not where a result shows their memory."""
    passed_on: tuple[tuple[int, int], ...]
    """Results that are inputs: their indices."""
    addresses: list[int]
    """Of what stays where it is."""
    given: list[tuple[int, weakref.ref[torch.Tensor]]] = field(default_factory=list)


class Recordings:
    """Called with the plan's inputs. Any number of threads may call; one at a time is replayed, others run the plan.

    Each replay compares the addresses of what it relies on with those of the call's tensors: RecordingError, or with
    `rerecords` a new recording. `checks_always` also overwrites what the last replay left behind, and raises where
    somebody still holds an output of it. With `compares` the plan's function is run too, on the same memory, and each
    result has to be the same to the bit.
    """

    def __init__(
        self, graph: RecordedGraph, recorder: Recorder, *, checks_always: bool, rerecords: bool, compares: bool
    ) -> None:
        self._graph = graph
        self._recorder = recorder
        self._checks_always = checks_always
        self._rerecords = rerecords
        self._compares = compares
        plan = graph.plan
        parameters = ", ".join(plan.inputs)
        sizes = ", ".join(dict.fromkeys(plan.symbols.values()))
        self._sizes = _function(f"lambda {parameters}: ({sizes}{',' if sizes else ''})")
        self._size = _function(f"lambda {parameters}: {plan.size}")
        used = {name for call in plan.calls for name in call.inputs}
        stays = [i for i, owner in enumerate(graph.owners) if owner in ("weight", "input")]
        self._pinned = [i for i in stays if plan.inputs[i] in used]
        self._steps = [i for i, owner in enumerate(graph.owners) if owner == "step input"]
        self._full: dict[Any, _Recorded] = {}
        self._piecewise: dict[Any, _Recorded] = {}
        self._block: Block | None = None
        self._lock = threading.Lock()
        self._asked: dict[int, tuple[CUDAGraphMode, bool]] = {}
        self._lazy: dict[int, CUDAGraphMode] = {}

    @classmethod
    def configured(cls, graph: RecordedGraph, recorder: Recorder, config: ResolvedConfig) -> Recordings:
        """As the configuration says."""
        always, rerecords = config.cudagraph_check == "always", config.on_memory_change == "rerecord"
        return cls(graph, recorder, checks_always=always, rerecords=rerecords, compares=config.cudagraph_debug)

    def __call__(self, *inputs: Any) -> Any:
        if self._asked and (asked := self._asked.pop(threading.get_ident(), None)) is not None:
            with self._lock:
                return self._record(*asked, inputs)
        is_inference = torch.is_inference_mode_enabled()
        found = self._full.get((is_inference, self._sizes(*inputs))) if self._full else None
        if found is None and self._piecewise:
            found = self._piecewise.get((is_inference, self._size(*inputs)))
        if found is None and self._lazy and (mode := self._lazy.get(self._size(*inputs))) is not None:
            with self._lock:
                return self._record(mode, False, self._with_statics(inputs))
        if found is None:
            reason = "size_not_recorded" if self._full or self._piecewise else "nothing_recorded"
            return self._unrecorded(reason, inputs)
        if not self._lock.acquire(blocking=False):
            return self._unrecorded("replaying_in_another_thread", inputs)
        try:
            return self._replayed(found, inputs)
        finally:
            self._lock.release()

    def _unrecorded(self, reason: str, inputs: tuple[Any, ...]) -> Any:
        counters.add(f"unrecorded_calls:{reason}")
        return self._graph.run(*inputs)

    @contextmanager
    def recording(self, mode: CUDAGraphMode, *, restores: bool = False) -> Iterator[None]:
        """Inside, this thread's call is recorded instead of replayed: with its sizes, and in its tensors' memory.

        The call raises RecordingError for what can't be recorded. With `restores`, tensors that it changes have their
        values back afterwards.
        """
        thread = threading.get_ident()
        self._asked[thread] = mode, restores
        try:
            yield
        finally:
            self._asked.pop(thread, None)

    def record_lazily(self, mode: CUDAGraphMode, sizes: Iterable[int]) -> None:
        """Has the first call of each of these sizes of the first dim be recorded, on copies of its step inputs.

        For a graph that has no other dims.
        """
        self._lazy = dict.fromkeys(sizes, mode)

    def forget(self) -> None:
        """Drops all recordings: the pieces that they were made of are replaced."""
        with self._lock:
            self._full.clear()
            self._piecewise.clear()
            self._block = None

    def recorded(self) -> tuple[RecordedSize, ...]:
        """The recordings, by size."""
        found = [one.shown for one in (*self._full.values(), *self._piecewise.values())]
        return tuple(sorted(found, key=lambda one: (one.num_tokens or 0, one.mode.name)))

    def memory(self) -> tuple[MemoryUse, ...]:
        """The memory of others that recordings rely on."""
        return tuple(
            dict.fromkeys(use for one in (*self._full.values(), *self._piecewise.values()) for use in one.manifest.uses)
        )

    def _replayed(self, found: _Recorded, inputs: tuple[Any, ...]) -> Any:
        pinned = [inputs[i] for i in self._pinned]
        if [one.data_ptr() for one in pinned] != found.addresses:
            counters.add("recordings_with_moved_memory")
            if not self._rerecords:
                raise found.manifest.changed(pinned)
            return self._record(found.shown.mode, False, self._with_statics(inputs, found))
        moved = [(static, inputs[i]) for i, static, address in found.statics if inputs[i].data_ptr() != address]
        if moved and not found.copies:
            return self._unrecorded("output_shows_input", inputs)
        if self._checks_always:
            self._check_kept(found)
        for static, given in moved if found.shown.mode is FULL else ():
            static.copy_(given)
        plain = self._plain_results(found, inputs) if self._compares else None
        results = list(found.replay(inputs))
        if plain is not None:
            _compare(plain, results, found.shown)
        counters.add(f"replays:{found.shown.mode.name}")
        for result, index in found.passed_on:
            results[result] = inputs[index]
        if moved:
            own = {result for result, _ in found.passed_on}
            results = [_cloned(one) if i not in own else one for i, one in enumerate(results)]
        elif self._checks_always:
            results = self._watched(found, results)
        return tuple(results)

    def _plain_results(self, found: _Recorded, inputs: tuple[Any, ...]) -> list[Any]:
        """What the plan's function gives on the same memory. What it has written is put back, unless that is large."""
        replaced = list(inputs)
        for index, static, _ in found.statics if found.shown.mode is FULL else ():
            replaced[index] = static
        with _restored(self._graph.plan.written, self._graph.plan.inputs, replaced, most=_PUT_BACK):
            return [_cloned(one) for one in self._graph.run(*replaced)]

    def _check_kept(self, found: _Recorded) -> None:
        """Raises RecordingError for an output of the last replay that somebody holds; overwrites what was left."""
        for index, held in found.given:
            if held() is not None:
                raise RecordingError(
                    f"output {index} of the last call is still held, and lies in the recording's memory: this call "
                    "would overwrite it",
                    where="a replay with cudagraph_check=always",
                    hint="clone it, drop it before the next call, or pass tensors of your own instead of the slots",
                    tensor=f"output {index}",
                )
        if self._block is not None:
            self._block.poison()

    def _watched(self, found: _Recorded, results: list[Any]) -> list[Any]:
        """Other tensors over the same memory, of which is known whether they are alive."""
        own = {result for result, _ in found.passed_on}
        views = [
            one.detach() if isinstance(one, torch.Tensor) and i not in own else one for i, one in enumerate(results)
        ]
        found.given = [
            (i, weakref.ref(one)) for i, one in enumerate(views) if isinstance(one, torch.Tensor) and i not in own
        ]
        return views

    def _with_statics(self, inputs: tuple[Any, ...], found: _Recorded | None = None) -> tuple[Any, ...]:
        """The inputs with step inputs that are ours to write to: those of a recording that was, or copies."""
        replaced = list(inputs)
        statics = {} if found is None else {index: static for index, static, _ in found.statics}
        for index in self._steps:
            static = statics.get(index)
            replaced[index] = inputs[index].clone() if static is None else static.copy_(inputs[index])
        return tuple(replaced)

    def _record(self, mode: CUDAGraphMode, restores: bool, inputs: tuple[Any, ...]) -> Any:
        """Records the call, and gives its results."""
        plan = self._graph.plan
        with _restored(plan.written if restores else (), plan.inputs, inputs):
            return self._record_call(mode, inputs)

    def _record_call(self, mode: CUDAGraphMode, inputs: tuple[Any, ...]) -> Any:
        started = time.perf_counter()
        graph, size = self._graph, self._size(*inputs)
        region = graph.region_of(size)
        left: Mapping[int, str] = {}
        is_inference = torch.is_inference_mode_enabled()
        try:
            if mode is FULL:
                recording, results = self._record_whole(region, inputs)
                replay: Callable[[tuple[Any, ...]], Sequence[Any]] = _Whole(recording, results)
                num_steps, num_bytes = len(recording.steps), recording.num_bytes
            else:
                recorded, results = record_pieces(graph, graph.regions[region], inputs, self._recorder)
                replay = _Pieces(plan_function(graph.plan, [recorded.pieces]))
                ours = [one for one in recorded.pieces if isinstance(one, ReplayedPiece)]
                num_steps, num_bytes = sum(one.num_steps for one in ours), sum(one.num_bytes for one in ours)
                left = recorded.unrecorded
        except NotRecordableError as error:
            raise self._refused(error, mode, size) from error
        shown = RecordedSize(size, mode, num_steps, num_bytes, time.perf_counter() - started, left)
        pinned = [inputs[i] for i in self._pinned]
        uses = (MemoryUse.of(graph.names[i], graph.owners[i], inputs[i]) for i in self._pinned)
        made = _Recorded(
            shown=shown,
            replay=replay,
            manifest=Manifest(tuple(uses)),
            statics=tuple((i, inputs[i], inputs[i].data_ptr()) for i in self._steps),
            copies=mode is PIECEWISE or not self._shows_step_input(results, inputs),
            passed_on=tuple(
                (result, index)
                for result, name in enumerate(graph.plan.results)
                for index, one in enumerate(graph.plan.inputs)
                if one == name
            ),
            addresses=[one.data_ptr() for one in pinned],
        )
        if mode is FULL:
            self._full[is_inference, self._sizes(*inputs)] = made
        else:
            self._piecewise[is_inference, size] = made
        counters.add(f"recordings:{mode.name}")
        return tuple(_cloned(one) if one is not None else one for one in results)

    def _record_whole(self, region: int, inputs: tuple[Any, ...]) -> tuple[Recording, Sequence[Any]]:
        graph, plan = self._graph, self._graph.plan
        pieces = graph.regions[region]
        for index, why in graph.unrecordable.items():
            code, _, words = why.partition(": ")
            raise NotRecordableError(code, f"piece {index}", f"isn't recorded: {words}")
        names = size_names(plan, [pieces])
        bound = list(pieces)
        if names is not None:
            if self._block is None:
                self._block = Block(plan, graph.regions, names)
            values = _function(f"lambda {', '.join(plan.inputs)}: ({', '.join(names)}{',' if names else ''})")(*inputs)
            bound = self._block.bound(region, *values)
        function = plan_function(plan, [bound])
        tensors = [one for one in inputs if isinstance(one, torch.Tensor)]
        return self._recorder.record(lambda: function(*inputs), tensors)

    def _shows_step_input(self, results: Sequence[Any], inputs: tuple[Any, ...]) -> bool:
        names = {self._graph.plan.inputs[i] for i in self._steps}
        memory = {inputs[i].untyped_storage().data_ptr() for i in self._steps}
        return any(
            isinstance(one, torch.Tensor) and name not in names and one.untyped_storage().data_ptr() in memory
            for name, one in zip(self._graph.plan.results, results, strict=True)
        )

    def _refused(self, error: NotRecordableError, mode: CUDAGraphMode, size: int | None) -> RecordingError:
        piece = failed_piece(error)
        line = None if piece is None else self._graph.user_line(piece, error.op)
        counters.add(f"not_recorded:{error.code}")
        at = "" if size is None else f" at size {size}"
        return RecordingError(
            f"{mode.name}{at} can't be recorded: {error.op} {error.why}",
            where=line or (None if piece is None else f"piece {piece}"),
            hint="cudagraph_mode=PIECEWISE records the pieces around a splitting op; NONE records nothing",
        )


@dataclass(frozen=True)
class _Whole:
    recording: Recording
    results: Sequence[Any]

    def __call__(self, inputs: tuple[Any, ...]) -> Sequence[Any]:
        self.recording.replay()
        return self.results


@dataclass(frozen=True)
class _Pieces:
    function: Callable[..., Any]

    def __call__(self, inputs: tuple[Any, ...]) -> Sequence[Any]:
        found: Sequence[Any] = self.function(*inputs)
        return found


@contextmanager
def _restored(
    written: Collection[str], names: Sequence[str], inputs: Sequence[Any], most: int | None = None
) -> Iterator[None]:
    """Puts back the values of the inputs that are `written`, unless all of these have more than `most` bytes."""
    tensors = [one for name, one in zip(names, inputs, strict=True) if name in written]
    is_too_much = most is not None and sum(one.nbytes for one in tensors) > most
    before = [] if is_too_much else [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, values in before:
            tensor.copy_(values)


def _compare(plain: Sequence[Any], replayed: Sequence[Any], shown: RecordedSize) -> None:
    """Raises RecordingError where a replay's results aren't those of the plain call, to the bit."""
    for index, (expected, found) in enumerate(zip(plain, replayed, strict=True)):
        if isinstance(expected, torch.Tensor) and not same_bytes(expected, found):
            raise RecordingError(
                f"output {index} of a replay ({shown.mode.name} at {shown.num_tokens}) isn't what the same call gives "
                "without the recording",
                where="a replay with cudagraph_debug",
                hint="cudagraph_mode=PIECEWISE, and `compiled.fallback(piece)`, narrow it down to a piece",
                tensor=f"output {index}",
            )


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _function(text: str) -> Callable[..., Any]:
    function: Callable[..., Any] = eval(text)  # noqa: S307 - our own text
    return function
