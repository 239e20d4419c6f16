"""Counts of what happened in this process: compiles, store hits, downgrades. Tests assert on them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Counters:
    """Named counts that only grow; any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Adds to a count."""
        with self._lock:
            self._counts[name] += count

    def snapshot(self) -> dict[str, int]:
        """All counts that aren't zero."""
        with self._lock:
            return dict(self._counts)

    @contextmanager
    def expect(self, **expected: int) -> Iterator[None]:
        """Asserts by how much each named count grows inside the block. Raises AssertionError with all of them."""
        before = self.snapshot()
        yield
        after = self.snapshot()
        grown = {name: after.get(name, 0) - before.get(name, 0) for name in expected}
        if grown != expected:
            raise AssertionError(f"expected {expected}, counted {grown}")


counters = Counters()
