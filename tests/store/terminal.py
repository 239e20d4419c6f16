"""A command in a terminal of its own, as a person would sit before it: what it prints, and what is typed."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Terminal:
    """A process whose stdin, stdout and stderr are one pseudo-terminal, which is its controlling one."""

    def __init__(self, words: list[str], variables: Mapping[str, str]) -> None:
        ours, theirs = pty.openpty()
        self._terminal, self.shown = ours, ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", _IN_THE_FOREGROUND, sys.executable, *words],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", **variables},
        )  # fmt: skip
        os.close(theirs)

    def expect(self, text: str, timeout_s: float = 120) -> str:
        """Waits until it is shown; gives what was shown before, and goes on behind it."""
        until = time.monotonic() + timeout_s
        while text not in self.shown:
            left = until - time.monotonic()
            assert left > 0 and self.read(left), f"{text!r} wasn't shown: {self.shown}"
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def end(self, timeout_s: float = 60) -> int:
        """Waits for the end; gives the exit code, and leaves in `shown` what was shown until then."""
        until = time.monotonic() + timeout_s
        while (left := until - time.monotonic()) > 0 and self.read(left):
            pass
        return self.process.wait(max(until - time.monotonic(), 1))

    def read(self, timeout_s: float = 60) -> bool:
        """Waits for more to be shown, and reads it; False when the process has closed the terminal."""
        if not select.select([self._terminal], [], [], timeout_s)[0]:
            return True
        try:
            found = os.read(self._terminal, 65536)
        except OSError:  # Linux's word for the end
            return False
        self.shown += found.decode(errors="replace").replace("\r\n", "\n")
        return bool(found)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        os.close(self._terminal)


_IN_THE_FOREGROUND = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@contextmanager
def terminal(words: list[str], **variables: str) -> Iterator[Terminal]:
    """A Python process with these arguments, which is ended with the block."""
    one = Terminal(words, variables)
    try:
        yield one
    finally:
        one.close()
