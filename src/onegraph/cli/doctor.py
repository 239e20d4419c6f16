"""`onegraph doctor`: checks all that onegraph needs, and says in one line each what is wrong and what to do."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from onegraph.cli.flags import Parser
from onegraph.env import environment
from onegraph.errors import CompileError, OnegraphError
from onegraph.ir.target import KernelSource
from onegraph.platform_check import platform_problem, torch_problem

EXAMPLE = """example:
  onegraph doctor --json
"""
PROBE = KernelSource(
    name="doctor_probe",
    argtypes=("const int64_t",),
    source="""
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel(const int64_t ks0)
{
    #pragma omp parallel for
    for (int64_t x0 = 0; x0 < ks0; x0++) { auto root = std::sqrt(double(x0)); (void)root; }
}
""",
)


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
    """Builds, loads and calls a kernel as compiled runs do: a compiler that only answers --version isn't enough."""
    from onegraph.targets.cpu.target import CpuTarget
    from onegraph.torch_compat.toolchain import ToolchainMissingError, compiler_version, cpp_compiler

    try:
        command = cpp_compiler()
        version = compiler_version(command)
    except ToolchainMissingError:
        return False, "no working C++ compiler: apt-get install g++, or use --enforce-eager, which needs none"
    target = CpuTarget()
    try:
        built = target.start_build([PROBE]).files()
    except CompileError as error:
        return False, f"{error.message}: apt-get install g++, or use --enforce-eager, which needs none"
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, contents in built.items():
            files[name] = Path(folder) / name
            files[name].write_bytes(contents)
        target.load_kernels(files)[PROBE.name](1)
    return True, f"{command}: {version}"


def _device() -> tuple[bool, str]:
    from onegraph.targets import describe_device, resolve_device, target_for
    from onegraph.targets.cpu.target import CpuTarget

    device = resolve_device("auto")
    target = target_for(device)
    if not isinstance(target, CpuTarget):  # whose compiler is looked at above
        target.check_toolchain()
    return True, f"{describe_device(device)}, {os.cpu_count()} cores"


def _memory() -> tuple[bool, str]:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    return True, f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB unused"


def _cache() -> tuple[bool, str]:
    current = environment()
    if current.disable_compile_cache:
        return True, "off (ONEGRAPH_DISABLE_COMPILE_CACHE)"
    from onegraph.store.store import Store

    store = Store.configured(current)
    store.open_base()
    store.open_root()
    mode = stat.S_IMODE(current.cache_root.stat().st_mode)
    free = shutil.disk_usage(current.cache_root).free
    over = "" if current.cache_base is None else f", over {current.cache_base}"
    signed = "" if current.cache_key_file is None else ", signed"
    kept = f"{store.size_bytes() / 2**20:.1f} MiB kept, {free / 2**30:.1f} GiB free"
    return True, f"{current.cache_root}, yours, mode {mode:04o}, {kept}{over}{signed}"


def _variables() -> tuple[bool, str]:
    current = environment()
    given = {
        "ONEGRAPH_CACHE_ROOT": current.cache_root_is_explicit,
        "ONEGRAPH_CACHE_BASE": current.cache_base is not None,
        "ONEGRAPH_CACHE_KEY_FILE": current.cache_key_file is not None,
        "ONEGRAPH_DISABLE_COMPILE_CACHE": current.disable_compile_cache,
        "ONEGRAPH_COMPILATION_CONFIG": current.compilation_config is not None,
        "ONEGRAPH_COMPILE_CACHE_SAVE_FORMAT": current.compile_cache_save_format is not None,
        "ONEGRAPH_LOG_LEVEL": current.log_level != "WARNING",
        "ONEGRAPH_ALLOW_UNTESTED_TORCH": current.allow_untested_torch,
    }
    return True, ", ".join(name for name, is_set in given.items() if is_set) or "none set"


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
