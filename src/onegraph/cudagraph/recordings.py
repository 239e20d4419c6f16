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
from typing import Any

import torch

from onegraph.config.compilation import CUDAGraphMode
from onegraph.config.resolve import ResolvedConfig
from onegraph.counters import counters
from onegraph.cudagraph.call_memory import (
    copied,
    handed_out,
    overlaps_itself,
    refuse_overlap,
    result_kinds,
    share_storage,
    shows_input,
)
from onegraph.cudagraph.comparison import PlainCall, restored, written
from onegraph.cudagraph.graph import RecordedGraph
from onegraph.cudagraph.manifest import Manifest, MemoryUse
from onegraph.cudagraph.padded_calls import PaddedCalls, next_sizes
from onegraph.cudagraph.pieces import PieceMemory, ReplayedPiece, record_pieces
from onegraph.cudagraph.recorded_call import PiecesReplay, RecordedCall, WholeReplay
from onegraph.cudagraph.sizes import Dispatcher
from onegraph.errors import RecordingError
from onegraph.ir.dims import DynamicDim
from onegraph.ir.padding import Policy
from onegraph.ir.recording import NotRecordableError, RecordedSize, Recorder, Recording
from onegraph.ops.memory import clone_together
from onegraph.plan.function import failed_piece, input_function, plan_function
from onegraph.plan.memory import Block, size_names

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE


class Recordings:
    """Called with the plan's inputs. Any number of threads may call; one at a time is replayed, others run the plan.

    Each replay compares the addresses of what it relies on with those of the call's tensors: RecordingError, or with
    `rerecords` a new recording. `checks_always` also overwrites what the last replay left behind, and raises where
    somebody still holds an output of it. `compares` says at which replays of a recording the plan's function is run
    too, on the same memory, and each result has to be the same to the bit: `never`, at the `first`, at `each`.
    """

    def __init__(
        self, graph: RecordedGraph, recorder: Recorder, *, checks_always: bool, rerecords: bool, compares: str
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
        self._full: dict[Any, RecordedCall] = {}
        self._piecewise: dict[Any, RecordedCall] = {}
        self._block: Block | None = None
        self._of_pieces: dict[int, PieceMemory] = {}
        self._turn = recorder.turn
        self._asked: dict[int, tuple[CUDAGraphMode, bool, bool]] = {}
        self._lazy: dict[int, CUDAGraphMode] = {}
        self._looks: dict[int, int] = {}
        self._padding: PaddedCalls | None = None
        self._dispatchers: dict[bool, Dispatcher] = {}

    @classmethod
    def configured(cls, graph: RecordedGraph, recorder: Recorder, config: ResolvedConfig) -> Recordings:
        """As the configuration says."""
        always, rerecords = config.cudagraph_check == "always", config.on_memory_change == "rerecord"
        default = "never" if config.asked("cudagraph_mode") else "first"  # nobody has looked whether it is right here
        compares = "each" if config.cudagraph_debug else default
        return cls(graph, recorder, checks_always=always, rerecords=rerecords, compares=compares)

    def __call__(self, *inputs: Any) -> Any:
        thread = threading.get_ident()
        asked = self._asked.pop(thread, None) if self._asked else None
        if self._turn.holder == thread:
            return self._unrecorded("inside_of_a_replay", inputs)
        if not self._turn.lock.acquire(blocking=asked is not None):
            return self._unrecorded("replaying_in_another_thread", inputs)
        self._turn.holder = thread
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
            elif self._padding is not None:
                reason, results = self._padded(self._padding, inputs, is_inference)
            else:
                reason, results = self._why_unrecorded(is_inference), ()
        finally:
            self._turn.holder = None
            self._turn.lock.release()
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

    @contextmanager
    def watched(self, watch: Callable[[Callable[[], Sequence[Any]], tuple[Any, ...]], Sequence[Any]]) -> Iterator[None]:
        """Inside, a replay of a call is `watch(replay, inputs)`, which gives what `replay()` gives."""
        plain = self._replay
        self._replay = lambda found, inputs: watch(lambda: plain(found, inputs), inputs)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self._replay

    def is_asked(self) -> bool:
        """Whether this thread's next call is recorded: it is inside of `recording`."""
        return threading.get_ident() in self._asked

    def record_lazily(self, mode: CUDAGraphMode, sizes: Iterable[int]) -> None:
        """Has the first call of each of these sizes of the first dim be recorded, on copies of its step inputs.

        For a graph that has no other dims.
        """
        self._lazy = dict.fromkeys(sizes, mode)

    def weights_are_of(self, look: int) -> None:
        """Tells that this thread's next call has its weights from a certain look at the module.

        A recording compares their addresses once for each look, unless it always checks.
        """
        self._looks[threading.get_ident()] = look

    def drop(self, size: int | None, mode: CUDAGraphMode) -> None:
        """Drops the recordings of this mode and size of the first dim."""
        with self._turn.lock:
            recorded = self._full if mode is FULL else self._piecewise
            for key in [key for key, one in recorded.items() if one.shown.num_tokens == size]:
                del recorded[key]
            self._dispatchers.clear()
            if not (self._full or self._piecewise):
                self._forget_memory()

    def pad(
        self,
        policies: Mapping[str, Policy],
        dims: Sequence[DynamicDim],
        slots: Callable[[int, Mapping[str, int]], dict[str, torch.Tensor]] | None,
    ) -> None:
        """Has calls of sizes between recorded ones be padded, if there are policies (see PaddedCalls).

        Raises ConfigError for policies that don't fit the graph.
        """
        if policies and slots is not None:
            self._padding = PaddedCalls(self._graph, policies, dims, slots)

    def forget(self) -> None:
        """Drops all recordings: the pieces that they were made of are replaced."""
        with self._turn.lock:
            self._full.clear()
            self._piecewise.clear()
            self._dispatchers.clear()
            self._forget_memory()

    def _forget_memory(self) -> None:
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

    @property
    def graph(self) -> RecordedGraph:
        """What is recorded."""
        return self._graph

    @property
    def padding(self) -> PaddedCalls | None:
        """How calls between recorded sizes are padded; None where they aren't."""
        return self._padding

    def statics(self) -> dict[int, torch.Tensor]:
        """Step inputs, by index, as one of the recordings has them."""
        every = (*self._piecewise.values(), *self._full.values())
        return {i: static for one in every for i, static, _ in one.statics}

    def _padded(self, padding: PaddedCalls, inputs: tuple[Any, ...], is_inference: bool) -> tuple[str | None, Any]:
        """The results of a call at the next recorded size, cut back to its own; or why the plan has to run instead."""
        length = self._size(*inputs) or 0
        if (why_not := padding.why_not_at(length)) is not None:
            return why_not, ()
        if is_inference not in self._dispatchers:
            known = (
                one.shown for key, one in (*self._full.items(), *self._piecewise.items()) if key[0] is is_inference
            )
            self._dispatchers[is_inference] = next_sizes(known, self._lazy)
        to = self._dispatchers[is_inference].decide(length, is_uniform_decode=True)
        if to.mode is CUDAGraphMode.NONE:
            return to.reason if to.reason == "above_largest" else self._why_unrecorded(is_inference), ()
        recorded = self._full if to.mode is FULL else self._piecewise
        found = recorded.get((is_inference, padding.sizes(to.size) if to.mode is FULL else to.size))
        if found is None and to.size not in self._lazy:
            return "size_not_recorded", ()
        if found is None:
            whole = padding.placed(inputs, padding.new_memory(to.size), length, to.size)
        elif not found.copies:
            return "output_shows_input", ()
        else:
            has_moved = self._has_moved(found, inputs)
            if self._checks_always:
                self._check_kept(found)
            whole = padding.placed(inputs, {i: static for i, static, _ in found.statics}, length, to.size)
        if found is None or has_moved:
            refuse_overlap(self._graph, whole, self._steps, self._pinned)
            found, results = self._record_call(to.mode, whole)
        else:
            results = self._replay(found, whole)
        counters.add(f"padded_calls:{to.mode.name}")
        counters.add(f"padding_rows:{to.mode.name}", to.size - length)
        cut = padding.cut(results, found.kinds, length)
        return None, handed_out(found.kinds, cut, inputs, copied=True)

    def _has_moved(self, found: RecordedCall, inputs: tuple[Any, ...]) -> bool:
        """Whether memory that was recorded lies elsewhere in this call: RecordingError, unless it is recorded again."""
        look = None if self._checks_always else self._looks.get(threading.get_ident())
        skipped = found.num_weights if look is not None and found.look == look else 0
        if [inputs[i].data_ptr() for i in found.pinned[skipped:]] == found.addresses[skipped:]:
            found.look = look
            return False
        pinned = [inputs[i] for i in found.pinned]
        counters.add("recordings_with_moved_memory")
        if not self._rerecords:
            raise found.manifest.changed(pinned)
        return True

    def _replayed(self, found: RecordedCall, inputs: tuple[Any, ...]) -> tuple[str | None, Any]:
        """The results of a replay; or why the plan has to run instead."""
        if self._has_moved(found, inputs):
            return self._recorded_first(found.shown.mode, inputs)
        moved = [(static, inputs[i]) for i, static, address in found.statics if inputs[i].data_ptr() != address]
        if moved and not found.copies:
            return "output_shows_input", ()
        if self._checks_always:
            self._check_kept(found)
        statics = [static for _, static, _ in found.statics]
        if moved and found.shown.mode is PIECEWISE and share_storage((given for _, given in moved), statics):
            return "input_shows_static_memory", ()  # each piece copies for itself
        if moved and found.shown.mode is FULL:
            given = [one for _, one in moved]
            if share_storage(given, statics):
                given = clone_together(given)  # one may be copied over another
            for (static, _), one in zip(moved, given, strict=True):
                static.copy_(one)
        results = self._replay(found, inputs)
        handed = handed_out(found.kinds, results, inputs, copied=bool(moved))
        if self._checks_always and not moved:
            found.given = [(i, weakref.ref(one)) for i, one in enumerate(handed) if found.kinds[i] == "ours"]
        return None, handed

    def _replay(self, found: RecordedCall, inputs: tuple[Any, ...]) -> Sequence[Any]:
        """The results in the recording's memory; its step inputs are filled."""
        plain = None
        if self._compares == "each" or (self._compares == "first" and not found.proven):
            statics = {i: static for i, static, _ in found.statics} if found.shown.mode is FULL else {}
            plain = PlainCall.of(self._graph, [statics.get(i, one) for i, one in enumerate(inputs)])
        results = found.replay(inputs)
        if plain is not None:
            plain.compare(results, found.shown)
            found.proven = True
        counters.add(f"replays:{found.shown.mode.name}")
        return results

    def _recorded_first(self, mode: CUDAGraphMode, inputs: tuple[Any, ...]) -> tuple[str | None, Any]:
        """Records a call that wasn't asked to be: on copies of the caller's tensors."""
        if any(overlaps_itself(inputs[i]) for i in self._steps):
            return "input_overlaps_itself", ()
        return None, self._record(mode, False, True, inputs)

    def _check_kept(self, found: RecordedCall) -> None:
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
            inputs = tuple(copied(one) if i in self._steps else one for i, one in enumerate(inputs))
        refuse_overlap(self._graph, inputs, self._steps, self._pinned)
        with restored(written(self._graph, inputs) if restores else ()):
            made, results = self._record_call(mode, inputs)
            return handed_out(made.kinds, results, inputs, copied=True)

    def _record_call(self, mode: CUDAGraphMode, inputs: tuple[Any, ...]) -> tuple[RecordedCall, Sequence[Any]]:
        """Records the call, and gives its results in the recording's memory."""
        started = time.perf_counter()
        graph, size = self._graph, self._size(*inputs)
        region = graph.region_of(size)
        left: Mapping[int, str] = {}
        pinned = self._pinned
        shared_before = self._shared_bytes
        is_inference = torch.is_inference_mode_enabled()
        try:
            if mode is FULL:
                recording, results = self._record_whole(region, inputs)
                replay: Callable[[tuple[Any, ...]], Sequence[Any]] = WholeReplay(recording, results)
                made_by: Sequence[Recording | ReplayedPiece] = [recording]
                num_steps, num_bytes = len(recording.steps), recording.num_bytes
            else:
                if region not in self._of_pieces:
                    self._of_pieces[region] = PieceMemory(graph, region)
                recorded, results = record_pieces(graph, self._of_pieces[region], inputs, self._recorder)
                replay = PiecesReplay(plan_function(graph.plan, [recorded.pieces]))
                ours = [one for one in recorded.pieces if isinstance(one, ReplayedPiece)]
                made_by = ours
                num_steps, num_bytes = sum(one.num_steps for one in ours), sum(one.num_bytes for one in ours)
                left = recorded.unrecorded
                used = {name for call in graph.plan.calls if call.piece not in left for name in call.inputs}
                pinned = [i for i in pinned if graph.plan.inputs[i] in used]  # what runs as ever takes what it is given
        except NotRecordableError as error:
            raise self._refused(error, mode, size) from error
        num_bytes += self._shared_bytes - shared_before
        shown = RecordedSize(size, mode, num_steps, num_bytes, time.perf_counter() - started, left)
        uses = (MemoryUse.of(graph.names[i], graph.owners[i], inputs[i]) for i in pinned)
        made = RecordedCall(
            shown=shown,
            replay=replay,
            manifest=Manifest(tuple(uses)),
            statics=tuple((i, inputs[i], inputs[i].data_ptr()) for i in self._steps),
            copies=mode is PIECEWISE or not shows_input(graph.plan, results, inputs, self._steps),
            kinds=result_kinds(graph.plan, results, inputs, self._pinned),
            pinned=pinned,
            addresses=[inputs[i].data_ptr() for i in pinned],
            num_weights=sum(graph.owners[i] == "weight" for i in pinned),
            made_by=made_by,
        )
        if mode is FULL:
            self._full[is_inference, self._sizes(*inputs)] = made
        else:
            self._piecewise[is_inference, size] = made
        self._dispatchers.clear()
        counters.add(f"recordings:{mode.name}")
        return made, results

    @property
    def _shared_bytes(self) -> int:
        """What the plan's intermediate values take, for all recordings together."""
        blocks = [] if self._block is None else [self._block.num_bytes]
        return sum(blocks) + sum(memory.num_bytes for memory in self._of_pieces.values())

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
