"""The harness: engines take turns at each workload, in processes of their own; medians, spread and ratios as JSON.

usage: python -m bench --shape 135m [--workloads a,b] [--engines a,b] [--repeats 3] [--offline-requests 64]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.models import SHAPES, make_model
from bench.worker import ENGINES
from bench.workloads import WORKLOADS, Workload

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """The machine and the versions, without names of hosts or users."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    commit, changed = (
        subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "../src", "."))
    )
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "commit": commit,
        "uncommitted_changes": bool(changed),
        **{name: version(name) for name in ("torch", "transformers", "onegraph")},
    }


def run_once(engine: str, model: Path, workload: Workload, cache: Path, timeout_s: float) -> dict[str, Any]:
    """One process. Gives seconds and tokens, or `{"failed": why}`."""
    variables = {
        **{k: v for k, v in os.environ.items() if not k.startswith("ONEGRAPH_")},
        "ONEGRAPH_CACHE_ROOT": str(cache / "onegraph"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "bench.worker", engine, str(model), json.dumps(asdict(workload)), str(time.time())]
    load = round(os.getloadavg()[0], 2)
    code, output, errors = run_in_own_group(command, variables, timeout_s)
    if code is None:
        return {"failed": f"timeout: took longer than {timeout_s:.0f} s"}
    if code != 0:
        return {"failed": without_paths((errors.strip().splitlines() or ["no output"])[-1])[:300]}
    return {**checked(json.loads(output.splitlines()[-1])), "load_average_before": load}


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


def without_paths(text: str) -> str:
    """The text with each absolute path cut to its last part: results are published, folders of users aren't."""
    return re.sub(r"(?<![\w.])/[^\s'\",:;)]*/", "…/", text)


def checked(run: dict[str, Any]) -> dict[str, Any]:
    """The run, or a failure where its seconds hold compiling, which isn't the speed of generation."""
    compiled = run.get("compiled_while_timed", 0)
    return {"failed": f"compiled {compiled} graphs while the clock ran"} if compiled else run


def summary(values: list[float]) -> dict[str, Any]:
    """Median and spread (min, max, distance of the quartiles) of the measurements, which stay listed."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": round(statistics.median(values), 4),
        "iqr": round(quartiles[2] - quartiles[0], 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "all": [round(value, 4) for value in values],
    }


def figures(workload: Workload, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One engine's figures for a workload: seconds for starts, tokens/s and ms per token for generation."""
    good = [run for run in runs if "failed" not in run]
    found: dict[str, Any] = {
        "failed": [run["failed"] for run in runs if "failed" in run],
        "threads": sorted({run["threads"] for run in good if "threads" in run}),
        "dtype": sorted({run["dtype"] for run in good if "dtype" in run}),
        "load_average_before": [run["load_average_before"] for run in good if "load_average_before" in run],
    }
    if good and workload.measure == "first_token":
        found["seconds"] = summary([run["seconds"] for run in good])
    elif good:
        found["tokens_per_s"] = summary([run["tokens"] / run["seconds"] for run in good])
        found["ms_per_token"] = summary([1000 * run["seconds"] * workload.num_requests / run["tokens"] for run in good])
    return found


def measure(
    shape: str, workloads: list[Workload], engines: list[str], repeats: int, timeout_s: float, folder: Path
) -> dict[str, Any]:
    """All measurements of one run, engines alternating within each repeat."""
    facts: dict[str, Any] = {"environment": environment(), "shape": {"name": shape, **SHAPES[shape]}, "workloads": {}}
    model = make_model(shape, folder / "model")
    filled = {engine: folder / f"filled-{engine}" for engine in engines}
    ready: set[str] = set()
    for workload in workloads:
        runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
        for repeat in range(repeats):
            for engine in engines:
                if workload.cache == "filled" and engine not in ready:
                    run_once(engine, model, WORKLOADS["cold_start"], filled[engine], timeout_s)
                    ready.add(engine)
                cache = filled[engine] if workload.cache == "filled" else folder / f"{workload.name}-{engine}-{repeat}"
                run = run_once(engine, model, workload, cache, timeout_s)
                runs[engine].append(run)
                told = run.get("failed") or f"{run['seconds']:.2f} s, {run['tokens']} tokens"
                print(f"{workload.name} {repeat + 1}/{repeats} {engine}: {told}", file=sys.stderr, flush=True)
        facts["workloads"][workload.name] = {
            "workload": asdict(workload),
            "engines": {engine: figures(workload, runs[engine]) for engine in engines},
        }
        add_ratios(facts["workloads"][workload.name]["engines"])
    return facts


def add_ratios(engines: dict[str, dict[str, Any]]) -> None:
    """Gives each engine its `ratio` to the first one (above 1: the first is better), None where either has failed."""
    baseline = next(iter(engines.values()))
    for found in engines.values():
        found["ratio"] = None
        for key in ("seconds", "tokens_per_s"):
            if key in found and key in baseline:
                ours, theirs = baseline[key]["median"], found[key]["median"]
                found["ratio"] = round(theirs / ours if key == "seconds" else ours / theirs, 4)


def table(facts: dict[str, Any]) -> str:
    """One line for each workload and engine, with the ratio to the first engine (above 1: the first is better)."""
    lines = [f"{'workload':<14} {'engine':<22} {'median':>12} {'min..max':>22} {'ratio':>7}"]
    for name, entry in facts["workloads"].items():
        for engine, found in entry["engines"].items():
            key = "seconds" if "seconds" in found else "tokens_per_s"
            if key not in found:
                lines.append(f"{name:<14} {engine:<22} {'failed':>12} {(found['failed'] or [''])[0][:40]}")
                continue
            one, unit = found[key], "s" if key == "seconds" else "tok/s"
            ratio = "" if found["ratio"] is None else f"{found['ratio']:.2f}"
            spread = f"{one['min']:.2f}..{one['max']:.2f}"
            lines.append(f"{name:<14} {engine:<22} {one['median']:>6.2f} {unit:<5} {spread:>22} {ratio:>7}")
    return "\n".join(lines)


def main() -> int:
    """Runs what the flags ask for, writes bench/results/DATE-SHAPE[-NAME].json, prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="135m", choices=sorted(SHAPES))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--offline-requests", type=int, default=64, help="fewer than 64 where time is short")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each process")
    parser.add_argument("--name", default="", help="ends the file's name, where a day has several runs of a shape")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    stem = "-".join(part for part in (date.today().isoformat(), options.shape, options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        parser.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    chosen = [WORKLOADS[name] for name in options.workloads.split(",")]
    chosen = [replace(w, num_requests=options.offline_requests) if w.name == "offline" else w for w in chosen]
    with tempfile.TemporaryDirectory(prefix="onegraph-bench-") as folder:
        facts = measure(
            options.shape, chosen, options.engines.split(","), options.repeats, options.timeout, Path(folder)
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(facts))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
