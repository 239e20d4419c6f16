"""Runs a command under TORCH_TRACE, as if it had been typed: it has the terminal, and the signals go to it.

What it was, how it ended and how long it took stand in the folder afterwards, beside the trace.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onegraph.debug.report_folder import RUN_FILE, TRACE_FOLDER, unwritable
from onegraph.debug.trace_log import find_logs
from onegraph.env import process_variables
from onegraph.errors import TraceError

_FOR_THE_COMMAND = (signal.SIGINT, signal.SIGTERM)
_FROM_THE_TERMINAL = 0x80  # SI_KERNEL
_GRACE_S = 5
"""Nobody tells whether the command got a signal that we got: so long it has to end, until it gets one from us."""


@dataclass(frozen=True)
class TracedRun:
    """A command that ran, its exit code (negative: the signal that ended it) and its seconds."""

    command: tuple[str, ...]
    exit_code: int
    seconds: float


def run_traced(command: Sequence[str], folder: Path, *, output: Any = None) -> TracedRun:
    """Runs it to its end; traces go to `folder`/trace. `output` is what its standard output goes to, if not to ours.

    SIGTERM is passed on to it. So is a SIGINT that was sent to us alone; Ctrl-C reaches it by itself, and ends it and
    not us. Raises TraceError where a trace lies there already, the command can't be started, or nothing can be written.
    """
    traces = folder / TRACE_FOLDER
    if traces.exists() and find_logs(traces):
        raise TraceError("there is a trace already", where=str(traces), hint="give another folder with --out")
    try:
        traces.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    began = time.monotonic()
    with _unharmed_by_signals():
        try:
            process = subprocess.Popen(
                command, stdout=output, env={**process_variables(), "TORCH_TRACE": str(traces.resolve())}
            )
        except OSError as error:
            with suppress(OSError):  # not if anything is in them
                traces.rmdir()
                folder.rmdir()
            raise TraceError(
                f"the command can't be started: {error}",
                where=" ".join(command),
                hint="after `--` comes a program with its arguments: onegraph trace -- python script.py",
            ) from error
        code = _waited_for(process)
    run = TracedRun(tuple(command), code, round(time.monotonic() - began, 3))
    try:
        (folder / RUN_FILE).write_text(json.dumps(asdict(run), indent=1))
    except OSError as error:
        raise unwritable(folder, error) from error
    return run


def kept_run(folder: Path) -> TracedRun | None:
    """What `run_traced` left in a folder; None where the trace came about otherwise."""
    try:
        known = json.loads((folder / RUN_FILE).read_text())
        return TracedRun(tuple(map(str, known["command"])), int(known["exit_code"]), float(known["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _unharmed_by_signals() -> Iterator[None]:
    """While the block runs, signals that are for the command don't end us.

    The handlers are Python's: a program that is started doesn't inherit them, as it would a signal that is ignored.
    """
    before = {number: signal.signal(number, lambda number, frame: None) for number in _FOR_THE_COMMAND}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _waited_for(process: subprocess.Popen[bytes]) -> int:
    """Waits for the end, and passes signals on. The terminal sends Ctrl-C to both of us: that is not sent again."""
    watched = {*_FOR_THE_COMMAND, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        while (code := process.poll()) is None:
            found = signal.sigtimedwait(watched, 0.5)
            if found is None or found.si_signo == signal.SIGCHLD:
                continue
            if found.si_signo == signal.SIGTERM:
                process.send_signal(signal.SIGTERM)
            elif found.si_code != _FROM_THE_TERMINAL and not _ends_by_itself(process):
                process.send_signal(signal.SIGINT)
        return code
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ends_by_itself(process: subprocess.Popen[bytes]) -> bool:
    """Whether it got the signal, too, as all of a group do; to a server a second one would say "at once"."""
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        return False
    return True
