"""Profiles steps of an engine: timers around its parts, the model's pieces and their kernels, for a while.

Takes an engine that is ready, in the thread that steps it. Gives a StepProfile. Outputs are what they are without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch

from onegraph.engine.engine import Engine
from onegraph.engine.scheduler import Batch, ScheduledSequence
from onegraph.ir.step_clock import Span, StepClock
from onegraph.ir.step_profile import (
    MODEL,
    REPLAY,
    STEP,
    BatchKind,
    Kind,
    ProfileEvent,
    ProfileRow,
    StepProfile,
)
from onegraph.torch_compat.structured_trace import trace_json

PARTS = (
    ("_scheduler", "schedule", "scheduler"),
    ("_runner", "_prepare", "input preparation"),
    ("_runner", "_forward", MODEL),
    ("", "_rank_prompt", "sampling"),
    ("", "_sampler", "sampling"),
    ("", "_postprocess", "outputs"),
    ("", "_stop_by_string", "detokenising"),
    ("", "_finish", "detokenising"),
)
"""What of an engine is timed: the part, its method, and the name of the span."""
RECORDING = ("_record", "recording")
"""The runner's method that records a batch which has come often enough, and its span."""


class StepProfiler:
    """Around an engine's steps: `with StepProfiler(engine) as profiler`, and in it `with profiler.step()` around each.

    Until it is left, the engine's methods have timers around them. `profile` is asked for afterwards.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._clock = StepClock(_waiting_for(engine.device))
        self._batches: Counter[BatchKind] = Counter()
        self._timers = ExitStack()
        self._sees_pieces = False

    def __enter__(self) -> StepProfiler:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Puts the timers in."""
        with ExitStack() as timers:
            for path, method, name in PARTS:
                owner = getattr(self._engine, path) if path else self._engine
                timers.enter_context(_replaced(owner, method, partial(self._clock.wrap, name)))
            runner, (method, name) = self._engine._runner, RECORDING
            timers.enter_context(_replaced(runner, method, partial(self._clock.wrap_whole, name)))
            timers.enter_context(_replaced(runner, "_prepare", self._noting_batches))
            self._sees_pieces = timers.enter_context(self._engine.timed(self._clock))
            self._timers = timers.pop_all()

    def stop(self) -> None:
        """Takes them out."""
        self._timers.close()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one step, with what belongs to it beside the engine's own work."""
        with self._clock.step(STEP):
            yield

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is timed as a part of the step in which it is called."""
        return self._clock.wrap(name, function)

    @property
    def num_steps(self) -> int:
        """Steps that had a batch."""
        return self._batches.total()

    def profile(self, *notes: str) -> StepProfile:
        """What was measured; `notes` are told with it. A trace that is being written (TORCH_TRACE) has it too."""
        found = self._profile(notes)
        if found.num_steps:
            trace_json("profile", found.to_dict)
        return found

    def _profile(self, notes: tuple[str, ...]) -> StepProfile:
        clock, steps = self._clock, max(self.num_steps, 1)
        spans = list(clock.top.all())
        whole, replays = (clock.top.inside.get(name) for name in (STEP, REPLAY))
        seconds = 0.0 if whole is None else whole.seconds
        if replays is not None:
            seconds += replays.seconds - clock.stood_in_s
        numbers = {id(span): number for number, span in enumerate(spans)}
        began_s = min((event.began_s for event in clock.events), default=0.0)
        return StepProfile(
            num_steps=self.num_steps,
            batches=dict(self._batches),
            seconds_per_step=seconds / steps,
            rows=tuple(_row(span, steps) for span in spans),
            notes=(*notes, *self._notes(spans, replays)),
            events=tuple(
                ProfileEvent(numbers[id(event.span)], event.began_s - began_s, event.seconds, event.is_aside)
                for event in clock.events
                if id(event.span) in numbers
            ),
        )

    def _notes(self, spans: list[Span], replays: Span | None) -> Iterator[str]:
        steps = max(self.num_steps, 1)
        if replays is not None:
            replay_ms, plain_ms = (1000 * one / replays.num_calls for one in (replays.seconds, self._clock.stood_in_s))
            yield (
                f"{replays.num_calls} of {self.num_steps} steps were replays of a recording, {replay_ms:.3f} ms each; "
                f"the rows of {STEP} are of the same batches run without their recordings, {plain_ms:.3f} ms each"
            )
        if not self._sees_pieces:
            yield "the model isn't compiled, so nothing is seen inside of its call"
        if self._clock.num_left_out:
            yield f"the timeline lacks the last {self._clock.num_left_out} steps"
        spans_per_step = sum(span.num_calls for span in spans) / steps
        cost_us = 1e6 * self._clock.seconds_of_a_span()
        yield f"timers take about {cost_us:.1f} us a call, {spans_per_step:.0f} calls a step"

    def _noting_batches(self, prepare: Callable[[Batch], Any]) -> Callable[[Batch], Any]:
        @wraps(prepare)
        def noted(batch: Batch) -> Any:
            self._batches[_kind(batch)] += 1
            return prepare(batch)

        return noted


def _waiting_for(device: torch.device) -> Callable[[], Any] | None:
    """What waits for work on the device, if the host doesn't do it itself."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.accelerator.synchronize if accelerator is not None and accelerator.type == device.type else None


@contextmanager
def _replaced(owner: Any, method: str, timed: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, the object has another method, or the same one with timers."""
    own = vars(owner).get(method)
    setattr(owner, method, timed(getattr(owner, method)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, method)
        else:
            setattr(owner, method, own)


def _kind(batch: Batch) -> BatchKind:
    decodes = sum(map(_is_decode, batch.scheduled))
    kind: Kind = "decode" if decodes == len(batch.scheduled) else "mixed" if decodes else "prefill"
    return BatchKind(batch.num_tokens, len(batch.scheduled), kind)


def _is_decode(item: ScheduledSequence) -> bool:
    return item.num_new_tokens == 1 and item.sequence.num_output_tokens > 0


def _row(span: Span, steps: int) -> ProfileRow:
    return ProfileRow(
        path=span.path,
        calls_per_step=span.num_calls / steps,
        seconds_per_step=span.seconds / steps,
        ops=span.ops,
        user=span.user,
        module_path=span.module_path,
    )
