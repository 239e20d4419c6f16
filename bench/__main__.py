"""The harness: engines take turns at each workload, in processes of their own; medians, spread and ratios as JSON.

usage: python -m bench --shape 135m [--workloads a,b] [--engines a,b] [--repeats 3] [--offline-requests 64]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "commit": commit,
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
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {timeout_s:.0f} s"}
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def summary(values: list[float]) -> dict[str, Any]:
    """Median and spread of the measurements, which stay listed."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "all": [round(value, 4) for value in values],
    }


def figures(workload: Workload, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One engine's figures for a workload: seconds for starts, tokens/s and ms per token for generation."""
    good = [run for run in runs if "failed" not in run]
    found: dict[str, Any] = {"failed": [run["failed"] for run in runs if "failed" in run]}
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
    return facts


def table(facts: dict[str, Any]) -> str:
    """One line for each workload and engine, with the ratio to the first engine (above 1: the first is better)."""
    lines = [f"{'workload':<14} {'engine':<22} {'median':>12} {'min..max':>22} {'ratio':>7}"]
    for name, entry in facts["workloads"].items():
        first = None
        for engine, found in entry["engines"].items():
            key = "seconds" if "seconds" in found else "tokens_per_s"
            if key not in found:
                lines.append(f"{name:<14} {engine:<22} {'failed':>12} {(found['failed'] or [''])[0][:40]}")
                continue
            one, unit = found[key], "s" if key == "seconds" else "tok/s"
            first = first or one["median"]
            ratio = one["median"] / first if key == "seconds" else first / one["median"]
            spread = f"{one['min']:.2f}..{one['max']:.2f}"
            lines.append(f"{name:<14} {engine:<22} {one['median']:>6.2f} {unit:<5} {spread:>22} {ratio:>7.2f}")
    return "\n".join(lines)


def main() -> int:
    """Runs what the flags ask for, writes bench/results/DATE-SHAPE.json, prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="135m", choices=sorted(SHAPES))
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--offline-requests", type=int, default=64, help="fewer than 64 where time is short")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each process")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    chosen = [WORKLOADS[name] for name in options.workloads.split(",")]
    chosen = [replace(w, num_requests=options.offline_requests) if w.name == "offline" else w for w in chosen]
    with tempfile.TemporaryDirectory(prefix="onegraph-bench-") as folder:
        facts = measure(
            options.shape, chosen, options.engines.split(","), options.repeats, options.timeout, Path(folder)
        )
    out = options.out or RESULTS / f"{facts['environment']['date']}-{options.shape}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(facts))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
