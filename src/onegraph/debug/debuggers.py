"""A piece's run under pdb, which stops in its wrapper, and a command line that runs the same under gdb."""

from __future__ import annotations

import ast
import pdb
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onegraph.errors import ConfigError

_CALL = "call"
"""The function of a wrapper that runs for each call of its piece."""


def under_pdb(wrapper: Path, run: Callable[[], Any]) -> Any:
    """Runs; pdb stops at the first line of the wrapper's `call`. Raises ConfigError where that can't be found."""
    line = _first_line(wrapper)
    debugger = pdb.Pdb()
    debugger.reset()
    problem = debugger.set_break(str(wrapper), line)
    if problem:
        raise ConfigError(f"pdb can't stop at {wrapper}:{line}: {problem}", where="--pdb")
    debugger.botframe = sys._getframe()
    debugger.set_continue()  # up to the breakpoint
    sys.settrace(debugger.trace_dispatch)
    try:
        return run()
    finally:
        sys.settrace(None)


def gdb_command(words: Sequence[str], kernels: str) -> list[str]:
    """The words of a program that runs `onegraph` with these words under gdb. Raises ConfigError without gdb."""
    gdb = shutil.which("gdb")
    if gdb is None:
        raise ConfigError(
            "gdb isn't installed", where="--gdb", hint="install it (Debian, Ubuntu: apt-get install gdb), or use --pdb"
        )
    told = (
        f"onegraph: `run` starts it, `break {kernels}:LINE` stops at a line of edited kernels, which have debug "
        "information (any edit will do, a comment too)\\n"
    )
    setup = ("set breakpoint pending on", "set print thread-events off", f"echo {told}")
    asked = [word for one in setup for word in ("-ex", one)]
    return [gdb, "-q", *asked, "--args", sys.executable, "-m", "onegraph.cli.main", *words]


def _first_line(wrapper: Path) -> int:
    for node in ast.walk(ast.parse(wrapper.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == _CALL:
            return node.body[0].lineno
    raise ConfigError(f"{wrapper} has no function `{_CALL}`", where="--pdb", hint="delete the file: it is written anew")
