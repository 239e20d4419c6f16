"""`onegraph doctor`: checks all that onegraph needs, and says in one line each what is wrong and what to do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from onegraph.cli.flags import Parser
from onegraph.env import environment
from onegraph.errors import OnegraphError
from onegraph.platform_check import platform_problem, torch_problem

EXAMPLE = """example:
  onegraph doctor --json
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `ok` false means that compiled runs don't work; the text says what to do."""

    name: str
    ok: bool
    text: str


def main(words: list[str]) -> int:
    """See `onegraph doctor --help`. Exit code 1 if something that is needed is broken."""
    parser = Parser(prog="onegraph doctor", description="Checks what onegraph needs on this machine.", epilog=EXAMPLE)
    parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    options = parser.parse_known_words(words)
    findings = [_looked_at(name, check) for name, check in CHECKS]
    healthy = all(finding.ok for finding in findings)
    if options.json:
        print(json.dumps({"ok": healthy, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'BAD '} {finding.name:<{width}}  {finding.text}")
        print("all good" if healthy else "something is wrong: see the lines marked BAD")
    return 0 if healthy else 1


def _looked_at(name: str, check: Callable[[], tuple[bool, str]]) -> Finding:
    try:
        return Finding(name, *check())
    except OnegraphError as error:
        return Finding(name, False, error.message + (f"; {error.hint}" if error.hint else ""))
    except Exception as error:  # noqa: BLE001 - a check that breaks is a finding, not a crash
        return Finding(name, False, f"{type(error).__name__}: {error}")


def _python() -> tuple[bool, str]:
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return good, f"{platform.python_version()} (supported: 3.11 to 3.13)"


def _platform() -> tuple[bool, str]:
    problem = platform_problem()
    return problem is None, problem or f"{sys.platform} {platform.machine()}"


def _torch() -> tuple[bool, str]:
    problem = torch_problem()
    if problem is not None and not environment().allow_untested_torch:
        return False, problem
    import torch

    return True, f"{torch.__version__}" + (f", allowed although: {problem}" if problem else "")


def _transformers() -> tuple[bool, str]:
    return True, importlib.metadata.version("transformers")


def _compiler() -> tuple[bool, str]:
    """Builds, loads and calls a one-line library: a compiler that only answers --version isn't enough."""
    command = os.path.basename(next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), ""))
    if not command:
        return False, "there is no C++ compiler: apt-get install g++ (or use --enforce-eager, which needs none)"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "a.cpp", Path(folder) / "a.so"
        source.write_text('#include <omp.h>\nextern "C" int answer() { return omp_get_max_threads() > 0 ? 42 : 0; }\n')
        built = subprocess.run(
            [command, "-shared", "-fPIC", "-fopenmp", "-o", str(library), str(source)], capture_output=True, text=True
        )
        if built.returncode:
            return False, f"{command} can't build a library: {(built.stderr.strip().splitlines() or ['no output'])[0]}"
        import ctypes

        answer = ctypes.CDLL(str(library)).answer()
    version = subprocess.run([command, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return answer == 42, version


def _device() -> tuple[bool, str]:
    import torch

    return True, f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _memory() -> tuple[bool, str]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return True, f"{total / 2**30:.1f} GiB"


def _cache() -> tuple[bool, str]:
    current = environment()
    if current.disable_compile_cache:
        return True, "off (ONEGRAPH_DISABLE_COMPILE_CACHE)"
    from onegraph.store.store import Store

    store = Store(current.cache_root)
    store.open_root()
    free = shutil.disk_usage(current.cache_root).free
    return True, f"{current.cache_root}, {store.size_bytes() / 2**20:.1f} MiB kept, {free / 2**30:.1f} GiB free"


def _variables() -> tuple[bool, str]:
    current = environment()
    given = []
    if current.cache_root_is_explicit:
        given.append("ONEGRAPH_CACHE_ROOT")
    if current.disable_compile_cache:
        given.append("ONEGRAPH_DISABLE_COMPILE_CACHE")
    if current.compilation_config:
        given.append("ONEGRAPH_COMPILATION_CONFIG")
    return True, ", ".join(given) or "none set"


CHECKS = (
    ("python", _python),
    ("platform", _platform),
    ("torch", _torch),
    ("transformers", _transformers),
    ("compiler", _compiler),
    ("device", _device),
    ("memory", _memory),
    ("cache", _cache),
    ("variables", _variables),
)
