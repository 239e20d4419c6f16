"""Processes of engines: which interpreter, which environment, and an end to all that they started."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM_ENGINES = frozenset({"vllm", "vllm-eager"})


def interpreter(engine: str, vllm_python: Path | None) -> str:
    """The Python that has the engine. Raises ValueError for vLLM where none was given."""
    if engine not in VLLM_ENGINES:
        return sys.executable
    if vllm_python is None:
        raise ValueError(f"{engine} needs --vllm-python, the interpreter of an environment that has vLLM")
    return str(vllm_python)


def variables(engine: str, cache: Path, vllm_python: Path | None) -> dict[str, str]:
    """The environment of an engine's process: all compile caches in the folder `cache`, no network.

    vLLM's CPU build gets a KV cache of 2 GiB (its default is refused on small machines), all cores that this process
    may use (its default leaves one out), and the OpenMP library that its environment brings.
    """
    found = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ONEGRAPH_")},
        "ONEGRAPH_CACHE_ROOT": str(cache / "onegraph"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "HF_HUB_OFFLINE": "1",
    }
    if engine in VLLM_ENGINES:
        assert vllm_python is not None
        found |= {
            "PYTHONPATH": str(ROOT),  # the worker, and nothing of this environment
            "VLLM_CACHE_ROOT": str(cache / "vllm"),
            "VLLM_CONFIG_ROOT": str(cache / "vllm-config"),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        }
        openmp = vllm_python.parent.parent / "lib" / "libiomp5.so"
        if openmp.exists():
            found["LD_PRELOAD"] = ":".join(filter(None, [str(openmp), os.environ.get("LD_PRELOAD", "")]))
    return found


def vllm_versions(vllm_python: Path) -> dict[str, str]:
    """The versions of the other environment, which may have another torch. Raises OSError or ValueError."""
    script = (
        "import json\nfrom importlib.metadata import PackageNotFoundError, version\nfound = {}\n"
        "for name in ('vllm', 'vllm-cpu', 'torch', 'transformers'):\n"
        "    try:\n        found[name] = version(name)\n    except PackageNotFoundError:\n        pass\n"
        "print(json.dumps(found))"
    )
    asked = subprocess.run([str(vllm_python), "-c", script], capture_output=True, text=True)
    found: dict[str, str] = json.loads(asked.stdout) if asked.returncode == 0 else {}
    if not found.keys() & {"vllm", "vllm-cpu"}:
        raise ValueError(f"the environment of {vllm_python.name} has no vLLM")
    return found


def run_in_own_group(command: list[str], variables: dict[str, str], timeout_s: float) -> tuple[int | None, str, str]:
    """Exit code (None after a timeout), stdout, stderr. A timeout ends the process with all that it started.

    Inductor's compile workers would else outlive it and load the machine under the next measurement.
    """
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except BaseException as error:  # also when the user interrupts
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None, "", ""
            raise
        return process.returncode, output, errors


def end_group(process: subprocess.Popen[bytes], grace_s: float = 20.0) -> None:
    """Asks a process that leads its group to end, and after `grace_s` ends it with all that it started."""
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def reason(errors: str) -> str:
    """Why a process failed: its last line that names an error, else its last line; without folders."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["no output"]
    named = [line for line in lines if re.search(r"\w(Error|Exception)\b", line)]
    return without_paths((named or lines)[-1])[:300]


def without_paths(text: str) -> str:
    """The text with each absolute path cut to its last part: results are published, folders of users aren't."""
    return re.sub(r"(?<![\w.])/[^\s'\",:;)]*/", "…/", text)
