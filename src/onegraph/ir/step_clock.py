"""Where the time of steps goes, as it is measured: spans inside of spans, summed by their path.

A step's spans are entered and left by what is put around the engine's methods, the pieces' calls and their kernels
while somebody profiles, and by nothing else. One thread uses a clock. A span is a name below the span that it is
entered in; its seconds include those of the spans inside of it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, ParamSpec, TypeVar

from onegraph.ir.artifact import PieceSource

MAX_EVENTS = 200_000
"""Single spans that are kept for a timeline, of whole steps; sums are of all."""

P = ParamSpec("P")
R = TypeVar("R")


class KernelSite(NamedTuple):
    """The `number`th kernel's call in a run of a piece's Python, which looks the kernel up by the name `called`."""

    source: PieceSource
    number: int
    called: str


@dataclass(eq=False, slots=True)
class Span:
    """All spans of one path."""

    name: str
    parent: Span | None = None
    inside: dict[str, Span] = field(default_factory=dict)
    seconds: float = 0.0
    num_calls: int = 0
    sites: set[KernelSite] = field(default_factory=set)
    """Of a kernel."""
    ops: tuple[str, ...] = ()
    user: str | None = None
    module_path: str = ""

    @property
    def path(self) -> tuple[str, ...]:
        """Its name below those that it is in."""
        above = () if self.parent is None else self.parent.path
        return (*above, self.name) if self.name else above

    def all(self) -> Iterator[Span]:
        """The spans below this one, each before those inside of it, in the order in which they were first entered."""
        for one in self.inside.values():
            yield one
            yield from one.all()

    def below(self, name: str) -> Span:
        """The span of that name inside of this one."""
        found = self.inside.get(name)
        if found is None:
            found = self.inside[name] = Span(name, self)
        return found


class Event(NamedTuple):
    """One span as it happened: `began_s` on the clock of `time.perf_counter`; `is_aside` as for `StepClock.aside`."""

    span: Span
    began_s: float
    seconds: float
    is_aside: bool


@dataclass(slots=True)
class _Open:
    """A span that was entered: `apart_s` is what wasn't counted until then, `num_kernels` how many it has called."""

    span: Span
    began_s: float
    apart_s: float
    num_kernels: int = 0


class StepClock:
    """The sums over all steps in `top`, and single spans in `events`.

    `wait` returns when a device has done what it was told to do: for devices that work while the host goes on.
    """

    def __init__(self, wait: Callable[[], Any] | None = None) -> None:
        self.top = Span("")
        self.events: list[Event] = []
        self.num_left_out = 0
        """Steps without events, once there are MAX_EVENTS."""
        self.stood_in_s = 0.0
        """Seconds in spans of steps for what was done otherwise, and stands `aside`."""
        self._wait = wait
        self._apart_s = 0.0
        self._open: list[_Open] = []
        self._keeps_events = True
        self._between_steps()

    def _between_steps(self) -> None:
        self._open = [_Open(Span(""), 0.0, 0.0)]

    @contextmanager
    def step(self, name: str = "step") -> Iterator[None]:
        """Around one step. What is timed outside of steps goes nowhere."""
        self._keeps_events = len(self.events) < MAX_EVENTS
        self.num_left_out += not self._keeps_events
        self._open = [_Open(self.top, 0.0, 0.0)]
        self.enter(name)
        try:
            yield
        finally:
            self._leave_to(1)
            self._between_steps()

    def enter(self, name: str) -> Span:
        """Begins a span inside of the one that was entered last."""
        span = self._open[-1].span.below(name)
        self._open.append(_Open(span, time.perf_counter(), self._apart_s))
        return span

    def enter_kernel(self, name: str, source: PieceSource, called: str) -> None:
        """As `enter`, for a kernel that a piece's Python calls."""
        caller = self._open[-1]
        self.enter(name).sites.add(KernelSite(source, caller.num_kernels, called))
        caller.num_kernels += 1

    def leave(self) -> float:
        """Ends the span that was entered last; gives its seconds."""
        if self._wait is not None and self._in_step:
            self._wait()
        ended = time.perf_counter()
        one = self._open.pop()
        seconds = ended - one.began_s - (self._apart_s - one.apart_s)
        one.span.seconds += seconds
        one.span.num_calls += 1
        if self._keeps_events:
            self.events.append(Event(one.span, one.began_s, ended - one.began_s, False))
        return seconds

    def _leave_to(self, depth: int) -> None:
        while len(self._open) > depth:
            self.leave()

    def wrap(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """The function in a span; what raises inside of it leaves no span open."""

        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            depth = len(self._open)
            self.enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave_to(depth)

        return timed

    def wrap_whole(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """As `wrap`, for a function inside of which nothing else is timed, and no device is waited for."""

        @functools.wraps(function)
        def unseen(*args: P.args, **kwargs: P.kwargs) -> R:
            opened = self._open
            self._between_steps()
            try:
                return function(*args, **kwargs)
            finally:
                self._open = opened

        return self.wrap(name, unseen)

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """A span beside the steps', whose time isn't counted in what it is entered in."""
        opened, self._open = self._open, [_Open(self.top if self._in_step else Span(""), 0.0, 0.0)]
        self.enter(name)
        began_s, apart_s = self._open[-1].began_s, self._apart_s
        try:
            yield
        finally:
            self._leave_to(1)
            if self._keeps_events:
                self.events[-1] = self.events[-1]._replace(is_aside=True)
            self._open, self._apart_s = opened, apart_s + time.perf_counter() - began_s

    def stand_in(self, run: Callable[[], Any]) -> None:
        """Runs what stands, in the span that was entered last, for something that is done aside."""
        began_s, apart_s, depth = time.perf_counter(), self._apart_s, len(self._open)
        try:
            run()
        finally:
            self._leave_to(depth)
            self.stood_in_s += time.perf_counter() - began_s - (self._apart_s - apart_s)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Inside, nothing is timed, and its time is counted nowhere."""
        opened, kept, began_s, apart_s = self._open, self._keeps_events, time.perf_counter(), self._apart_s
        self._between_steps()
        self._keeps_events = False
        try:
            yield
        finally:
            self._open, self._keeps_events = opened, kept
            self._apart_s = apart_s + time.perf_counter() - began_s

    @property
    def _in_step(self) -> bool:
        return self._open[0].span is self.top

    def seconds_of_a_span(self, repeats: int = 2000) -> float:
        """What a span itself takes, most of it in the span that it is inside of."""
        with self.left_out():
            began = time.perf_counter()
            for _ in range(repeats):
                self.enter("span")
                self.leave()
            return (time.perf_counter() - began) / repeats
