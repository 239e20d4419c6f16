"""What stands for g++ in the tests: a library that one run of the tests has built isn't built again.

Most tests begin with an empty compile cache, and so compile what many others compile: the kernels of onegraph's ops,
the pieces of the same small models. They test when the compiler is run and what becomes of its library, not g++ itself.

`put_before_path` makes a program `g++` in a folder in front of PATH, so that a test which takes compilers away by
PATH, or puts its own there, gets what it asked for. For a shared library of one C++ file the program runs this file:
usage: compiler_cache.py COMPILER FOLDER ARGUMENT..., in the place of COMPILER ARGUMENT...
It copies the library from FOLDER if this text was compiled with these arguments before, but for the paths of source
and library. These are in the debug information of what it copies; a text that is to name its file has a #line.
All else, and all that fails, is the compiler's own doing.

Most of what g++ does for a piece is to parse torch's header for vectors, so what has to be compiled is compiled with
this header precompiled: the machine code is the same, in a third of the time.
"""

import contextlib
import fcntl
import hashlib
import os
import shlex
import signal
import sys
from pathlib import Path

HEADER = "torch/csrc/inductor/cpp_prefix.h"
RUNS_WITHOUT = 3
"""Precompiling takes as long as three runs gain."""


def put_before_path(compiler: str, folder: Path) -> Path:
    """Gives the folder of the program, for which `folder` is shared by all processes of a run of the tests."""
    programs, kept = folder / "bin", folder / "kept"
    programs.mkdir(parents=True, exist_ok=True)
    kept.mkdir(exist_ok=True)
    cached = shlex.join([sys.executable, "-IS", __file__, compiler, str(kept)])
    program = programs / f"g++.{os.getpid()}"
    program.write_text(f"""#!/bin/sh
case " $* " in
*" -shared "*) exec {cached} "$@" ;;
*) exec {shlex.quote(compiler)} "$@" ;;
esac
""")
    program.chmod(0o755)
    program.replace(programs / "g++")
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return programs


def main() -> int:
    compiler, folder, *arguments = sys.argv[1:]
    sources = [word for word in arguments if word.endswith(".cpp")]
    if len(sources) != 1 or "-o" not in arguments[:-1]:
        return run(compiler, arguments)
    library = Path(arguments[arguments.index("-o") + 1])
    others = [word for word in arguments if word not in (*sources, str(library))]
    facts = hashlib.sha256("\0".join([compiler, *others, ""]).encode())
    text = Path(sources[0]).read_bytes()
    facts.update(text)
    kept = Path(folder) / facts.hexdigest()
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of two that want the same waits, instead of taking the other's CPU
        with contextlib.suppress(OSError):  # without room for the library the compiler says so in its own words
            library.write_bytes(kept.read_bytes())
            library.chmod(0o755)
            return 0
        if text.startswith(f"#include <{HEADER}>".encode()):
            with contextlib.suppress(OSError):
                arguments.insert(0, f"-I{precompiled(compiler, others, Path(folder))}")
        status = run(compiler, arguments)
        if status == 0:
            with contextlib.suppress(OSError):
                copy = kept.with_suffix(".copy")
                copy.write_bytes(library.read_bytes())
                copy.replace(kept)
    return status


def precompiled(compiler: str, flags: list[str], folder: Path) -> Path:
    """A folder in which the compiler finds HEADER precompiled for these flags, where that pays.

    The compiler itself passes by a precompiled header that doesn't fit.
    """
    flags = [word for word in flags if word not in ("-o", "-shared") and not word.startswith(("-l", "-L"))]
    found = folder / hashlib.sha256("\0".join(flags).encode()).hexdigest()
    with found.with_suffix(".runs").open("ab") as runs:
        fcntl.flock(runs, fcntl.LOCK_EX)
        runs.write(b".")
        if runs.tell() == RUNS_WITHOUT + 1:
            headers = (Path(word.removeprefix("-I"), HEADER) for word in flags if word.startswith("-I"))
            made = found / f"{HEADER}.gch"
            made.parent.mkdir(parents=True)
            header = next(str(one) for one in headers if one.exists())
            if run(compiler, [*flags, "-x", "c++-header", header, "-o", f"{made}.new"], errors=os.devnull) == 0:
                Path(f"{made}.new").replace(made)
    return found


def run(compiler: str, arguments: list[str], errors: str | None = None) -> int:
    """The exit status, with the signals as a compiler finds them: Python ignores two."""
    child = os.posix_spawn(
        compiler,
        [compiler, *arguments],
        os.environ,
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        file_actions=[(os.POSIX_SPAWN_OPEN, 2, errors, os.O_WRONLY, 0)] if errors else [],
    )
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
