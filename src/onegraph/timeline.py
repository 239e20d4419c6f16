"""When this process did what: the stages of its start, in seconds since it began, for traces and reports.

Takes stages as they end, from any thread, and two moments: ready, and the first token. Gives them as data. When the
process began is the operating system's word; where it has none, the import of this module.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_EVENTS = 1000
"""A start has some dozens; a process that captures again and again is no start any more."""


@dataclass(frozen=True)
class Event:
    """A stage: `start_s` is counted from the beginning of the process; `detail` says of what."""

    name: str
    start_s: float
    seconds: float
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "start_s": round(self.start_s, 3),
            "seconds": round(self.seconds, 3),
            "detail": self.detail,
        }


class Timeline:
    """The stages of one process, `age_s` seconds old when this is made."""

    def __init__(self, age_s: float) -> None:
        self._began = time.perf_counter() - age_s
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self.ready_s: float | None = None
        """When a model was last ready before its first token; None before."""
        self.first_token_s: float | None = None

    @property
    def now_s(self) -> float:
        """Seconds since the process began."""
        return time.perf_counter() - self._began

    @property
    def started_at(self) -> float:
        """When the process began, in seconds since the epoch."""
        return time.time() - self.now_s

    def add(self, name: str, started: float, seconds: float, detail: str = "") -> None:
        """A stage that has ended; it began at `started` of `time.perf_counter`."""
        with self._lock:
            if len(self._events) < MAX_EVENTS:
                self._events.append(Event(name, max(started - self._began, 0.0), seconds, detail))

    @contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[None]:
        """The block as a stage, also if it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, started, time.perf_counter() - started, detail)

    def imports(self, name: str, detail: str = "") -> types.ModuleType:
        """Imports a module; as a stage, of `detail` or of the module, where it is new to the process."""
        with nullcontext() if name in sys.modules else self.stage("import", detail or name):
            return importlib.import_module(name)

    def is_ready(self) -> None:
        """A model can be called from now on. What comes after the first token is no part of the start."""
        if self.first_token_s is None:
            self.ready_s = self.now_s

    def has_first_token(self) -> bool:
        """Told of each request's first token; gives whether it is the process's."""
        if self.first_token_s is not None:
            return False
        self.first_token_s = self.now_s
        ready_s = self.first_token_s if self.ready_s is None else self.ready_s
        self.add("first token", self._began + ready_s, self.first_token_s - ready_s)
        return True

    def to_dict(self) -> dict[str, Any]:
        with self._lock:
            events = sorted(self._events, key=lambda event: event.start_s)
        moments = {"ready_s": self.ready_s, "first_token_s": self.first_token_s}
        return {
            "events": [event.to_dict() for event in events],
            **{name: None if moment is None else round(moment, 3) for name, moment in moments.items()},
        }


def process_age_s() -> float:
    """How long this process has been there, to a hundredth; 0 where the system doesn't tell (it is Linux's way)."""
    try:
        facts = Path("/proc/self/stat").read_text()
        ticks = int(facts.rpartition(")")[2].split()[19])  # the name before may hold anything
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return age if ticks > 0 and age >= 0 else 0.0


timeline = Timeline(process_age_s())
timeline.add("import", time.perf_counter() - timeline.now_s, timeline.now_s, "before onegraph")
