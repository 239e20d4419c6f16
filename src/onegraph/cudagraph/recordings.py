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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from onegraph.config.compilation import CUDAGraphMode
from onegraph.config.resolve import ResolvedConfig
from onegraph.counters import counters
from onegraph.cudagraph.comparison import PlainCall, restored, written
from onegraph.cudagraph.graph import RecordedGraph
from onegraph.cudagraph.manifest import Manifest, MemoryUse
from onegraph.cudagraph.pieces import PieceMemory, ReplayedPiece, record_pieces
from onegraph.errors import RecordingError
from onegraph.ir.recording import NotRecordableError, RecordedSize, Recorder, Recording
from onegraph.ops.memory import clone_together
from onegraph.plan.function import failed_piece, input_function, plan_function
from onegraph.plan.memory import Block, size_names
from onegraph.torch_compat.overlap import overlapping

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE


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
    kinds: tuple[int | str | None, ...]
    """What each result is: an input, by its index; `ours`, in the recording's memory; `theirs`, in memory that stays
    the caller's, such as a view of a cache; or None for what is no tensor."""
    addresses: list[int]
    """Of what stays where it is."""
    made_by: list[Any]
    """Its recordings, whose memory `poison` overwrites."""
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
        self._sizes = input_function(plan, tuple(dict.fromkeys(plan.symbols.values())))
        self._first = input_function(plan, (plan.size,))
        used = {name for call in plan.calls for name in call.inputs}
        stays = [i for i, owner in enumerate(graph.owners) if owner in ("weight", "input")]
        self._pinned = [i for i in stays if plan.inputs[i] in used]
        self._steps = [i for i, owner in enumerate(graph.owners) if owner == "step input"]
        self._full: dict[Any, _Recorded] = {}
        self._piecewise: dict[Any, _Recorded] = {}
        self._block: Block | None = None
        self._of_pieces: dict[int, PieceMemory] = {}
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._asked: dict[int, tuple[CUDAGraphMode, bool, bool]] = {}
        self._lazy: dict[int, CUDAGraphMode] = {}

    @classmethod
    def configured(cls, graph: RecordedGraph, recorder: Recorder, config: ResolvedConfig) -> Recordings:
        """As the configuration says."""
        always, rerecords = config.cudagraph_check == "always", config.on_memory_change == "rerecord"
        return cls(graph, recorder, checks_always=always, rerecords=rerecords, compares=config.cudagraph_debug)

    def __call__(self, *inputs: Any) -> Any:
        thread = threading.get_ident()
        asked = self._asked.pop(thread, None) if self._asked else None
        if self._holder == thread:
            return self._unrecorded("inside_of_a_replay", inputs)
        if not self._lock.acquire(blocking=asked is not None):
            return self._unrecorded("replaying_in_another_thread", inputs)
        self._holder = thread
        try:
            if asked is not None:
                return self._record(*asked, inputs)
            is_inference = torch.is_inference_mode_enabled()
            found = self._full.get((is_inference, self._sizes(*inputs))) if self._full else None
            if found is None and self._piecewise:
                found = self._piecewise.get((is_inference, self._size(*inputs)))
            if found is not None:
                reason, results = self._replayed(found, inputs)
            elif self._lazy and (mode := self._lazy.get(self._size(*inputs) or 0)) is not None:
                reason, results = self._recorded_first(mode, inputs)
            else:
                reason, results = self._why_unrecorded(is_inference), ()
        finally:
            self._holder = None
            self._lock.release()
        return self._unrecorded(reason, inputs) if reason else results

    def _why_unrecorded(self, is_inference: bool) -> str:
        known = [key[0] for key in (*self._full, *self._piecewise)]
        if not known:
            return "nothing_recorded"
        return "size_not_recorded" if is_inference in known else "other_inference_mode"

    def _size(self, *inputs: Any) -> int | None:
        """Of the first declared dim."""
        size: int | None = self._first(*inputs)[0]
        return size

    def _unrecorded(self, reason: str, inputs: tuple[Any, ...]) -> Any:
        counters.add(f"unrecorded_calls:{reason}")
        return self._graph.run(*inputs)

    @contextmanager
    def recording(self, mode: CUDAGraphMode, *, restores: bool = False, copies: bool = False) -> Iterator[None]:
        """Inside, this thread's call is recorded instead of replayed: with its sizes, and in its tensors' memory.

        The call raises RecordingError for what can't be recorded. With `restores`, tensors that it changes have their
        values back afterwards; with `copies` its step inputs are recorded in memory of the recording's own.
        """
        thread = threading.get_ident()
        self._asked[thread] = mode, restores, copies
        try:
            yield
        finally:
            self._asked.pop(thread, None)

    def is_asked(self) -> bool:
        """Whether this thread's next call is recorded: it is inside of `recording`."""
        return threading.get_ident() in self._asked

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
            self._of_pieces.clear()

    def recorded(self) -> tuple[RecordedSize, ...]:
        """The recordings, by size."""
        found = [one.shown for one in (*self._full.values(), *self._piecewise.values())]
        return tuple(sorted(found, key=lambda one: (one.num_tokens or 0, one.mode.name)))

    def memory(self) -> tuple[MemoryUse, ...]:
        """The memory of others that recordings rely on."""
        return tuple(
            dict.fromkeys(use for one in (*self._full.values(), *self._piecewise.values()) for use in one.manifest.uses)
        )

    def _replayed(self, found: _Recorded, inputs: tuple[Any, ...]) -> tuple[str | None, Any]:
        """The results of a replay; or why the plan has to run instead."""
        pinned = [inputs[i] for i in self._pinned]
        if [one.data_ptr() for one in pinned] != found.addresses:
            counters.add("recordings_with_moved_memory")
            if not self._rerecords:
                raise found.manifest.changed(pinned)
            return self._recorded_first(found.shown.mode, inputs)
        moved = [(static, inputs[i]) for i, static, address in found.statics if inputs[i].data_ptr() != address]
        if moved and not found.copies:
            return "output_shows_input", ()
        if self._checks_always:
            self._check_kept(found)
        if moved and found.shown.mode is PIECEWISE and _share_storage([given for _, given in moved], found.statics):
            return "input_shows_static_memory", ()  # each piece copies for itself
        if moved and found.shown.mode is FULL:
            given = [one for _, one in moved]
            if _share_storage(given, found.statics):
                given = clone_together(given)  # one may be copied over another
            for (static, _), one in zip(moved, given, strict=True):
                static.copy_(one)
        plain = None
        if self._compares:
            statics = {i: static for i, static, _ in found.statics} if found.shown.mode is FULL else {}
            plain = PlainCall.of(self._graph, [statics.get(i, one) for i, one in enumerate(inputs)])
        results = found.replay(inputs)
        if plain is not None:
            plain.compare(results, found.shown)
        counters.add(f"replays:{found.shown.mode.name}")
        handed = _handed_out(found.kinds, results, inputs, copied=bool(moved))
        if self._checks_always and not moved:
            found.given = [(i, weakref.ref(one)) for i, one in enumerate(handed) if found.kinds[i] == "ours"]
        return None, handed

    def _recorded_first(self, mode: CUDAGraphMode, inputs: tuple[Any, ...]) -> tuple[str | None, Any]:
        """Records a call that wasn't asked to be: on copies of the caller's tensors."""
        if any(_overlaps_itself(inputs[i]) for i in self._steps):
            return "input_overlaps_itself", ()
        return None, self._record(mode, False, True, inputs)

    def _kinds(self, results: Sequence[Any], inputs: tuple[Any, ...]) -> tuple[int | str | None, ...]:
        """As _Recorded.kinds."""
        places = {name: i for i, name in enumerate(self._graph.plan.inputs)}
        theirs = {_storage_address(inputs[i]) for i in self._pinned}

        def kind(name: Any, result: Any) -> int | str | None:
            if isinstance(name, str) and name in places:
                return places[name]
            if not isinstance(result, torch.Tensor):
                return None
            return "theirs" if _storage_address(result) in theirs else "ours"

        return tuple(kind(*pair) for pair in zip(self._graph.plan.results, results, strict=True))

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
        for memory in self._of_pieces.values():
            memory.poison()
        for recording in found.made_by:
            recording.poison()

    def _record(self, mode: CUDAGraphMode, restores: bool, copies: bool, inputs: tuple[Any, ...]) -> Any:
        """Records the call, and gives its results."""
        if copies:
            inputs = tuple(_copy(one) if i in self._steps else one for i, one in enumerate(inputs))
        self._refuse_overlap(inputs)
        with restored(written(self._graph, inputs) if restores else ()):
            return self._record_call(mode, inputs)

    def _refuse_overlap(self, inputs: tuple[Any, ...]) -> None:
        """Raises RecordingError where filling one input would change another, or a weight."""
        places = [*self._steps, *self._pinned]
        pair = overlapping([inputs[i] for i in places]) if self._steps else None
        if pair is not None and min(pair) < len(self._steps):
            first, second = (self._graph.names[places[i]] for i in pair)
            raise RecordingError(
                f"{first} and {second} share memory, and later calls fill one without the other",
                where="record",
                hint="record a call with tensors that lie apart, such as those of slots()",
                tensor=first,
            )

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
                made_by: list[Any] = [recording]
                num_steps, num_bytes = len(recording.steps), recording.num_bytes
            else:
                if region not in self._of_pieces:
                    self._of_pieces[region] = PieceMemory(graph, region)
                recorded, results = record_pieces(graph, self._of_pieces[region], inputs, self._recorder)
                replay = _Pieces(plan_function(graph.plan, [recorded.pieces]))
                made_by = ours = [one for one in recorded.pieces if isinstance(one, ReplayedPiece)]
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
            kinds=self._kinds(results, inputs),
            addresses=[one.data_ptr() for one in pinned],
            made_by=made_by,
        )
        if mode is FULL:
            self._full[is_inference, self._sizes(*inputs)] = made
        else:
            self._piecewise[is_inference, size] = made
        counters.add(f"recordings:{mode.name}")
        return _handed_out(made.kinds, results, inputs, copied=True)

    def _record_whole(self, region: int, inputs: tuple[Any, ...]) -> tuple[Recording, Sequence[Any]]:
        graph, plan = self._graph, self._graph.plan
        for index, why in graph.unrecordable.items():
            code, _, words = why.partition(": ")
            raise NotRecordableError(code, f"piece {index}", f"isn't recorded: {words}")
        names = size_names(plan, graph.regions)
        bound = graph.regions[region]
        if names is not None:
            if self._block is None:
                self._block = Block(plan, graph.regions, names)
            bound = self._block.bound(region, *input_function(plan, names)(*inputs))
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
            hint="cudagraph_mode=NONE records nothing"
            + ("; PIECEWISE records the pieces around a splitting op" if mode is FULL else ""),
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


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """In memory of its own, with the same strides."""
    return clone_together([tensor])[0]


def _storage_address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _share_storage(tensors: Sequence[torch.Tensor], statics: Sequence[tuple[int, torch.Tensor, int]]) -> bool:
    theirs = {_storage_address(static) for _, static, _ in statics}
    return any(_storage_address(one) in theirs for one in tensors)


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether elements share memory, as after `expand`: such a tensor can't be filled."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


def _handed_out(
    kinds: Sequence[int | str | None], results: Sequence[Any], inputs: tuple[Any, ...], *, copied: bool
) -> tuple[Any, ...]:
    """What the caller gets: other tensors over the recording's memory, or `copied` into memory of its own.

    They share memory with one another as the results do.
    """
    given = [
        inputs[kind] if isinstance(kind, int) else one if kind is None else one.detach()
        for kind, one in zip(kinds, results, strict=True)
    ]
    if copied:
        ours = [i for i, kind in enumerate(kinds) if kind == "ours"]
        for i, one in zip(ours, clone_together([given[i] for i in ours]), strict=True):
            given[i] = one
    return tuple(given)
