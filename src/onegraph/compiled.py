"""CompiledModel: the result of onegraph.compile. It is called like the module, and explains itself.

The first call (or `warm_up`) captures and compiles through the pipeline; every later call runs the entry that
the pipeline made: state checks, input checks, the traced function's residual code, the pieces. No Dynamo runs
after that, unless Python state that was captured has changed: then the module is captured once more.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from onegraph.built import Built, Changes, SizedCall
from onegraph.config.compilation import CUDAGraphMode, checked
from onegraph.counters import counters
from onegraph.cudagraph.shown import shown
from onegraph.errors import ConfigError, StateChangedError
from onegraph.explanation import Explanation
from onegraph.ir.recording import RecordedSize, RecordingPlan
from onegraph.ir.step_clock import StepClock
from onegraph.ir.step_profile import PIECE
from onegraph.log import get_logger
from onegraph.numerics.oracle import SizeCheck, check_call
from onegraph.step_timing import timed_graphs
from onegraph.torch_compat.pytree import tree_map
from onegraph.torch_compat.torch_logs import log_artifact

log = get_logger(__name__)

MAX_TRACES = 8
"""Traces that one compiled model keeps for different states; a module that changes on every call runs eager."""

Fallbacks = dict[tuple[int, int | None], str]
"""Piece, and the size whose artifact is meant or None for all -> why it runs uncompiled."""


class CompiledModel:
    """A compiled module or function.

    `original` is the module or function itself, unchanged. `build(args, kwargs)` makes an entry, in the caller's
    thread: at the first call or `warm_up`, and again when captured state has changed and `on_state_change` is
    `recapture`. Any number of threads may call.

    `state_checked` says when captured state is compared: before every `call`, or on an `event`, which the owner of
    the module tells by `check_state()`.
    """

    def __init__(
        self,
        original: Any,
        build: Callable[[tuple[Any, ...], dict[str, Any]], Built],
        unbuilt: Callable[[], Explanation],
        *,
        on_state_change: str = "recapture",
        state_checked: Literal["call", "event"] = "call",
    ) -> None:
        self.original = original
        self._build = build
        self._unbuilt = unbuilt
        self._on_state_change = on_state_change
        self._state_checked = state_checked
        self._current: Built | None = None
        self._traces: list[Built] = []
        self._told_too_many = False
        self._checks: tuple[SizeCheck, ...] = ()
        self._fallbacks: Fallbacks = {}
        self._slots: dict[Any, dict[str, torch.Tensor]] = {}
        self._recording_plan: RecordingPlan | None = None
        self._planned_for: Built | None = None
        self._building = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the compiled module; gives what the module itself would give, with its type and structure.

        Raises ShapeOutOfRangeError for a size outside its declared range, InputContractError for another
        dtype, device, rank, layout or constant than the captured one, StateChangedError for changed Python state
        where that is asked for; when it captures also what compiling raises (ConfigError, CaptureError,
        ConstraintError, CompileError).
        """
        built = self._current
        if built is None or (self._state_checked == "call" and built.holds is not None and not built.holds()):
            built = self._ensure_built(args, kwargs)
        return built.entry(*args, **kwargs)

    def warm_up(self, example: Mapping[str, Any] | None = None, /, *args: Any, **kwargs: Any) -> None:
        """Captures and compiles ahead of traffic, without running the module; and records, where that is asked for.

        `example` maps argument names to example values; their sizes don't matter within the declared ranges. Calls of
        the sizes in `cudagraph_capture_sizes` are recorded in the memory of `slots(size)`, one without dynamic dims in
        its own: that runs the module, and puts back what the graph writes. `record` is for several dims.
        """
        args, kwargs = _arguments(example, args, kwargs)
        with self._building:
            built = self._ensure_built(args, kwargs)
            if built.planned is not None and self._planned_for is not built:
                self._record_planned(
                    built, *built.planned(args, kwargs, lambda call: self._record_in_slots(built, call))
                )

    def _record_planned(self, built: Built, planned: RecordingPlan, calls: Iterable[SizedCall]) -> None:
        self._recording_plan = planned
        log.info("recording %s", "; ".join(planned.lines()))
        size = None if planned.first is None else planned.first.num_tokens
        if size is not None and size not in planned.sizes[built.recorded_as]:
            for recordings in built.recordings:  # before others are made, in memory as large as it needs
                recordings.drop(size, built.recorded_as)
        for call in sorted(calls, key=lambda call: -call.size):  # they share memory
            self._record_in_slots(built, call)
        self._planned_for = built

    def _record_in_slots(self, built: Built, call: SizedCall) -> RecordedSize | None:
        """Records the call in the memory of `slots`, where it has declared dims; or tells of what is recorded."""
        before = [size for one in built.recordings for size in one.recorded()]
        for known in before:
            if (known.num_tokens or 0, known.mode) == (call.size, built.recorded_as):
                return known
        slots = self.slots(call.size) if call.tensors else {}
        replaced = {id(tensor): slots[path].copy_(tensor) for path, tensor in call.tensors.items()}
        args, kwargs = tree_map(lambda value: replaced.get(id(value), value), (call.args, call.kwargs))
        self._recorded(built, built.recorded_as, args, kwargs, restores=True, copies=not slots)
        after = (size for one in built.recordings for size in one.recorded())
        return next((size for size in after if not any(size is one for one in before)), None)

    def _recorded(
        self, built: Built, mode: CUDAGraphMode, args: tuple[Any, ...], kwargs: dict[str, Any], **how: bool
    ) -> Any:
        with ExitStack() as asked:
            for recordings in built.recordings:
                asked.enter_context(recordings.recording(mode, **how))
            return built.entry(*args, **kwargs)

    def check_state(self) -> bool:
        """Compares captured Python state now, for an owner that changed its module: the next call captures anew.

        Gives whether it still holds. Raises StateChangedError if not and `on_state_change` is `error`.
        """
        with self._building:
            if self._current is not None and not _holds(self._current):
                if self._on_state_change == "error":
                    raise _state_changed(self._current.changes())
                self._current = None
            return self._current is not None

    def record(
        self,
        example: Mapping[str, Any] | None = None,
        /,
        *args: Any,
        recorded_as: CUDAGraphMode | str = CUDAGraphMode.FULL,
        **kwargs: Any,
    ) -> Any:
        """Runs this very call and records it, for replays at its sizes; gives its result. Compiles first if need be.

        The recording works in the memory of its arguments: tensors with declared dims (`slots` makes such) are filled
        by later calls, or have other tensors copied into them; weights, tensors that the module changes, and all others
        must lie where they are now. `recorded_as` is FULL for the whole call, or PIECEWISE for its compiled pieces, at
        any sizes of other dims than the first. Raises ConfigError, and RecordingError.
        """
        args, kwargs = _arguments(example, args, kwargs)
        mode = checked("cudagraph_mode", recorded_as)
        if mode not in (CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE):
            raise ConfigError(f"recorded_as={mode.name}", where="record", hint="give FULL or PIECEWISE")
        with self._building:
            return self._recorded(self._recordable(args, kwargs), mode, args, kwargs)

    def drop_recording(self, size: int | None, recorded_as: CUDAGraphMode) -> None:
        """Drops what `record` made for this size of the first dim; None where there is none."""
        with self._building:
            for recordings in self._current.recordings if self._current is not None else ():
                recordings.drop(size, recorded_as)

    def _recordable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
        built = self._ensure_built(args, kwargs)
        if not built.recordings:
            raise ConfigError(
                "nothing is recorded: cudagraph_mode is NONE, or nothing is compiled",
                where="record",
                hint="compile with cudagraph_mode=FULL or PIECEWISE",
            )
        return built

    def check(
        self, example: Mapping[str, Any] | None = None, /, *args: Any, num_sizes: int = 8, **kwargs: Any
    ) -> tuple[SizeCheck, ...]:
        """Compares the compiled model with eager and with fp64, at `num_sizes` sizes of the first declared dim.

        The arguments are an example call, as for `warm_up`; its rows are repeated or cut to each size. Gives a
        tuple of SizeCheck, which `explain()` shows from then on. Compiles first if need be. Raises ConfigError
        for a mode that compiles nothing of ours, and what the model raises.
        """
        args, kwargs = _arguments(example, args, kwargs)
        built = self._ensure_built(args, kwargs)
        if built.check is None:
            raise ConfigError("nothing is compiled, so there is nothing to check", hint="give another mode")
        self._checks = tuple(built.check(self, args, kwargs, num_sizes))
        return self._checks

    def check_calls(
        self, calls: Iterable[tuple[int, dict[str, Any]]], shared: Mapping[str, Any]
    ) -> tuple[SizeCheck, ...]:
        """As `check`, on given calls: pairs of a size and keyword arguments.

        `shared` are further arguments for all of them, which aren't cloned (see `numerics.oracle.check_call`).
        """
        self._checks = tuple(
            SizeCheck(size, check_call(self, self.original, (), kwargs, shared)) for size, kwargs in calls
        )
        return self._checks

    def fallback(self, piece: int, backend: str = "eager", size: int | None = None) -> None:
        """Has one piece, by its number in `explain()`, run uncompiled from the next call on, and after recaptures too.

        With `size`, a size of the first declared dim, only the piece's artifact that serves that size. Before the first
        call it takes effect when the model is compiled. Raises ConfigError for a piece that there isn't, and for
        another backend than eager.
        """
        if backend != "eager":
            raise ConfigError(f"a piece can fall back to eager, not to {backend!r}", where="fallback")
        for given in (piece, *([] if size is None else [size])):
            if isinstance(given, bool) or not isinstance(given, int):
                raise ConfigError(f"{given!r} is no whole number", where="fallback")
        self._fall_back(piece, size, "asked for by fallback()")

    def slots(self, size: int, **others: int) -> dict[str, torch.Tensor]:
        """Static input tensors for an engine that fills them in place, by argument: the same ones at each call.

        `size` is that of the first declared dim, `others` are those of further dims by name. Each tensor with a
        declared dim is in it, of the example's dtype, device and strides, filled with zeros; `x[0]` names one inside of
        an argument. After a recapture they are made anew. Raises ConfigError before the first call or `warm_up`, for
        sizes that don't fit the dims, and for an expanded example; ShapeOutOfRangeError.
        """
        with self._building:
            built = self._current or (self._traces[-1] if self._traces else None)
            if built is None:
                raise ConfigError(
                    "there are slots once the model is compiled", hint="call warm_up first", where="slots"
                )
            if built.slots is None:
                raise ConfigError("nothing is compiled, so there are no slots", hint="give another mode", where="slots")
            key = built.slots, str(size), str(sorted(others.items()))
            if key not in self._slots:
                self._slots[key] = built.slots(size, others)
            return dict(self._slots[key])

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes what was compiled to one file, for `onegraph.load` here or on another machine of the same kind.

        It holds code, the weights' names and kinds, and no weights. Raises ConfigError before the first call or
        `warm_up`, ArtifactError for a build that can't be kept, or a file that can't be written.
        """
        with self._building:
            built = self._current or (self._traces[-1] if self._traces else None)
            if built is None:
                raise ConfigError(
                    "there is something to save once the model is compiled", hint="call warm_up first", where="save"
                )
            if built.save is None:
                raise ConfigError(
                    "nothing is compiled, so nothing can be saved", hint="give another mode", where="save"
                )
            built.save(Path(file))

    def demote(self, error: BaseException) -> bool:
        """Has the compiled piece that raised `error` run uncompiled from now on, and logs it.

        Gives False where no compiled piece raised it, so that running again would raise it again; and where somebody
        has edited the piece, who wants to see what it raises.
        """
        with self._building:
            built = self._current
            piece = None if built is None else built.failed_piece(error)
            if built is None or piece is None:
                return False
            explained = built.explanation.pieces[piece]
            if explained.backend == "eager" or any(one.edited for one in explained.ranges):
                return False
            why = f"it raised {type(error).__name__}: {str(error)[:200]}"
            log.warning("piece %d runs uncompiled from now on: %s", piece, why)
            counters.add("demoted_pieces")
            self._fall_back(piece, None, why)
            return True

    @contextmanager
    def timed(self, clock: StepClock) -> Iterator[bool]:
        """Inside, pieces and kernels of this thread's calls are spans of the clock; see `step_timing`.

        Gives False where there is nothing to be seen: nothing is compiled. What is captured anew inside isn't timed.
        """
        built = self._current
        pieces = () if built is None else built.explanation.pieces
        names = [f"{PIECE}{one.index}" + (f" ({one.module_path})" if one.module_path else "") for one in pieces]
        graphs = () if built is None else built.graphs
        with timed_graphs(graphs, names, clock):
            yield bool(graphs)

    def _fall_back(self, piece: int, size: int | None, why: str) -> None:
        with self._building:
            for index, trace in enumerate(self._traces):
                self._traces[index] = _fallen_back(trace, {(piece, size): why})
                if trace is self._current:
                    self._current = self._traces[index]
            self._fallbacks[piece, size] = why

    def explain(self) -> Explanation:
        """How this model was compiled; before the first call, what is configured."""
        built = self._current or (self._traces[-1] if self._traces else None)
        explanation = self._unbuilt() if built is None else built.explanation
        recordings = () if built is None else built.recordings
        told = shown(recordings, explanation.dims)
        return replace(explanation, checks=self._checks, recording_plan=self._recording_plan, **told)

    def _ensure_built(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
        """The trace whose state holds now, made if there is none; the module itself after too many."""
        with self._building:
            fitting = next((trace for trace in self._traces if _holds(trace)), None)
            if fitting is None:
                fitting = self._recaptured(args, kwargs)
            self._current = fitting
            return fitting

    def _recaptured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
        if self._traces:
            changes = self._traces[-1].changes()
            if self._on_state_change == "error":
                raise _state_changed(changes)
            if len(self._traces) >= MAX_TRACES:
                if not self._told_too_many:
                    self._told_too_many = True
                    log.warning("%s", _too_many(changes))
                counters.add("eager_calls")
                return Built(self.original, self.explain(), holds=lambda: False)
            counters.add("recaptures")
            log.warning("captured once more: %s", _told(changes))
            log_artifact("recompiles", lambda: f"{self._unbuilt().model} is captured once more: {_told(changes)}")
        built = self._build(args, kwargs)
        for (piece, size), why in list(self._fallbacks.items()):
            try:
                built = _fallen_back(built, {(piece, size): why})
            except ConfigError as error:
                del self._fallbacks[piece, size]  # or no call would run any more
                if not self._traces:
                    self._traces.append(built)
                    raise
                log.warning("no longer falling back: %s", str(error).splitlines()[0])
        self._traces.append(built)
        return built

    def __getattr__(self, name: str) -> Any:
        """Attributes of the module, so that a compiled module can stand where the module stood.

        A method that returns the module itself (`eval`, `to`) returns this compiled model.
        """
        if name.startswith("_") or "original" not in self.__dict__:
            raise AttributeError(name)
        original = self.__dict__["original"]
        value = getattr(original, name)
        if getattr(value, "__self__", None) is not original:
            return value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return self if result is original else result

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets the module's attribute, as `__getattr__` reads it."""
        if name.startswith("_") or name == "original":
            object.__setattr__(self, name, value)
        else:
            setattr(self.original, name, value)

    def __delattr__(self, name: str) -> None:
        """Deletes the module's attribute, as `__setattr__` sets it."""
        if name.startswith("_") or name == "original":
            object.__delattr__(self, name)
        else:
            delattr(self.original, name)

    def __reduce__(self) -> Any:
        raise ConfigError(
            "a compiled model can't be pickled or copied",
            hint="compile the module again where you need it: the compile cache makes that a warm start",
        )

    def __repr__(self) -> str:
        state = "not yet compiled" if self._current is None else "compiled"
        return f"<onegraph.CompiledModel of {type(self.original).__name__}, {state}>"


def _arguments(example: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of an example call: a mapping has arguments by name, anything else is the first one."""
    if isinstance(example, Mapping):
        return args, {**example, **kwargs}
    return (args if example is None else (example, *args)), kwargs


def _fallen_back(built: Built, pieces: Fallbacks) -> Built:
    for (piece, size), why in pieces.items():
        if built.fallback is None:
            raise ConfigError("nothing is compiled, so no piece can fall back", where="fallback")
        built = built.fallback(piece, why, size)
    return built


def _holds(built: Built) -> bool:
    return built.holds is None or built.holds()


def _told(changes: Changes) -> str:
    """At most three changes in words, with the line that read each value."""
    told = [
        f"{entry.what} was {entry.value}, and now is {now}" + (f" (read at {entry.user})" if entry.user else "")
        for entry, now in changes[:3]
    ]
    more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
    return "; ".join(told) + more


def _state_changed(changes: Changes) -> StateChangedError:
    return StateChangedError(
        f"the compiled code was made for other Python state: {_told(changes)}",
        where=changes[0][0].user if changes else None,
        hint="change it back, pass what changes as an argument, or leave out on_state_change=error, "
        "and the module is captured once more",
        changes=changes,
    )


def _too_many(changes: Changes) -> str:
    return (
        f"Python state has changed {MAX_TRACES} times, and from here on the module runs uncompiled whenever it is "
        f"one that was not captured: {_told(changes)}. Pass what changes as a tensor argument."
    )
