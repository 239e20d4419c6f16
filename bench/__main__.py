"""The harness: engines take turns at each workload, in processes of their own; medians, spread and ratios as JSON.

usage: python -m bench --shape 135m [--workloads a,b] [--engines a,b] [--repeats 3] [--vllm-python PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import onegraph.version
from bench.figures import Run, add_ratios, figures, server_figures
from bench.models import SHAPES, make_model
from bench.processes import VLLM_ENGINES, interpreter, reason, run_in_own_group, variables, vllm_versions
from bench.server import SERVERS, run_server
from bench.table import markdown_table, text_table
from bench.worker import ENGINES, RESULT
from bench.workloads import SERVER, WORKLOADS, ServerWorkload, Workload

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
        **{name: version(name) for name in ("torch", "transformers")},
        "onegraph": onegraph.version.__version__,
    }


def run_once(
    engine: str, model: Path, workloads: list[Workload], cache: Path, timeout_s: float, vllm_python: Path | None = None
) -> list[Run]:
    """One process, which has `timeout_s` for each workload. Gives seconds and tokens of each, or `{"failed": why}`."""
    words = [engine, str(model), json.dumps([asdict(workload) for workload in workloads]), str(time.time())]
    command = [interpreter(engine, vllm_python), "-m", "bench.worker", *words]
    load = round(os.getloadavg()[0], 2)
    limit = timeout_s * len(workloads)
    code, output, errors = run_in_own_group(command, variables(engine, cache, vllm_python), limit)
    if code is None:
        return [{"failed": f"timeout: took longer than {limit:.0f} s"} for _ in workloads]
    results = [line for line in output.splitlines() if line.startswith(RESULT)]
    if code != 0 or not results:
        return [{"failed": f"exit code {code}: {reason(errors)}"} for _ in workloads]
    return [{**checked(run), "load_average_before": load} for run in json.loads(results[-1].removeprefix(RESULT))]


def checked(run: Run) -> Run:
    """The run, or a failure where its seconds hold compiling, which isn't the speed of generation."""
    compiled = run.get("compiled_while_timed", 0)
    return {"failed": f"compiled {compiled} graphs while the clock ran"} if compiled else run


def tell(workload: str, repeat: str, engine: str, run: Run) -> None:
    """One line on a measurement, to stderr."""
    if "failed" in run:
        told = run["failed"]
    elif "levels" in run:
        levels = (
            f"{level}: {one['failed'] if 'failed' in one else format(one['output_tokens_per_s'], '.1f') + ' tokens/s'}"
            for level, one in run["levels"].items()
        )
        told = f"ready after {run['ready_s']:.1f} s; {', '.join(levels)}"
    else:
        told = f"{run['seconds']:.2f} s, {run['tokens']} tokens"
    print(f"{datetime.now():%H:%M:%S} {workload} {repeat} {engine}: {told}", file=sys.stderr, flush=True)


@dataclass
class Harness:
    """One run of the harness: a model, where its caches lie, and the caches that are filled so far."""

    model: Path
    folder: Path
    repeats: int
    timeout_s: float
    vllm_python: Path | None = None
    server_repeats: int | None = None
    filled: dict[str, Path] = field(default_factory=dict)

    def measure(self, chosen: dict[Workload, list[str]]) -> dict[str, Any]:
        """The figures of workloads, by name. Engines alternate within each repeat.

        An engine does them one after the other in one process, so only one of them may be a start.
        """
        runs: dict[Workload, dict[str, list[Run]]] = {one: {name: [] for name in chosen[one]} for one in chosen}
        engines = list(dict.fromkeys(name for found in chosen.values() for name in found))
        for repeat in range(self.repeats):
            for engine in engines:
                asked = [one for one in chosen if engine in chosen[one]]
                for one, run in zip(asked, self._run(engine, asked, self._cache(engine, asked, repeat)), strict=True):
                    tell(one.name, f"{repeat + 1}/{self.repeats}", engine, run)
                    runs[one][engine].append(run)
        facts = {}
        for one, of_engines in runs.items():
            found = {engine: figures(one, of_engines[engine]) for engine in of_engines}
            add_ratios(found)
            facts[one.name] = {"workload": asdict(one), "engines": found}
        return facts

    def measure_server(self, workload: ServerWorkload, engines: list[str]) -> dict[str, Any]:
        """The same for servers. An unmeasured start fills an engine's cache, in seconds that are noted, too.

        Where other workloads of the run have filled it, there is none: some engines take minutes.
        """
        started: dict[str, list[float]] = {engine: [] for engine in engines}
        for engine in engines:
            if engine not in self.filled:
                run = self._serve(engine, replace(workload, concurrency=()))
                tell(workload.name, "filling the cache", engine, run)
                started[engine] = [round(run["ready_s"], 4)] if "ready_s" in run else []
        runs: dict[str, list[Run]] = {engine: [] for engine in engines}
        repeats = self.server_repeats or self.repeats
        for repeat in range(repeats):
            for engine in engines:
                run = self._serve(engine, workload)
                tell(workload.name, f"{repeat + 1}/{repeats}", engine, run)
                runs[engine].append(run)
        found = {
            engine: {"ready_s_of_first_start": started[engine], **server_figures(workload, runs[engine])}
            for engine in engines
        }
        add_ratios(found)
        return {"workload": asdict(workload), "engines": found}

    def _cache(self, engine: str, workloads: list[Workload], repeat: int) -> Path:
        """An empty cache, or the engine's filled one: by a measured cold start, else by an unmeasured one.

        For generation alone nothing is filled before: its unmeasured round compiles, and some starts take minutes.
        """
        if workloads[0].cache == "empty":
            return self.folder / f"{workloads[0].name}-{engine}-{repeat}"
        if engine not in self.filled:
            if any(workload.measure == "first_token" for workload in workloads):
                self._run(engine, [WORKLOADS["cold_start"]], self.folder / f"filled-{engine}")
            self.filled.setdefault(engine, self.folder / f"filled-{engine}")
        return self.filled[engine]

    def _run(self, engine: str, workloads: list[Workload], cache: Path) -> list[Run]:
        runs = run_once(engine, self.model, workloads, cache, self.timeout_s, self.vllm_python)
        if workloads[0].cache == "empty" and "failed" not in runs[0]:
            self.filled.setdefault(engine, cache)
        return runs

    def _serve(self, engine: str, workload: ServerWorkload) -> Run:
        cache = self.filled.setdefault(engine, self.folder / f"{workload.name}-{engine}")
        return run_server(engine, self.model, workload, cache, self.timeout_s, self.vllm_python)


def measure(
    shape: str,
    workloads: list[Workload | ServerWorkload],
    engines: list[str],
    repeats: int,
    timeout_s: float,
    folder: Path,
    *,
    vllm_python: Path | None = None,
    server_repeats: int | None = None,
    left_out: frozenset[tuple[str, str]] = frozenset(),
    save: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> dict[str, Any]:
    """All measurements of one run. `left_out` has pairs of workload and engine; servers are measured for SERVERS.

    `save` gets what there is so far, after each workload that has processes of its own: a run may take an hour.
    """
    facts: dict[str, Any] = {"environment": environment(), "shape": {"name": shape, **SHAPES[shape]}}
    if vllm_python is not None:
        facts["environment"]["vllm"] = vllm_versions(vllm_python)
    facts["left_out"] = sorted(":".join(pair) for pair in left_out)
    facts["workloads"] = {}
    harness = Harness(make_model(shape, folder / "model"), folder, repeats, timeout_s, vllm_python, server_repeats)
    chosen = {
        workload: [engine for engine in engines if (workload.name, engine) not in left_out and can(engine, workload)]
        for workload in workloads
    }
    starts = [one for one in chosen if isinstance(one, Workload) and one.cache == "empty"]
    rest = [one for one in chosen if isinstance(one, Workload) and one.cache == "filled" and chosen[one]]
    rest.sort(key=lambda one: one.measure != "first_token")  # a start is the first thing that a process does
    for one in starts:
        facts["workloads"] |= harness.measure({one: chosen[one]})
        save(facts)
    facts["workloads"] |= harness.measure({one: chosen[one] for one in rest})
    save(facts)
    for workload in chosen:
        if isinstance(workload, ServerWorkload) and chosen[workload]:
            facts["workloads"][workload.name] = harness.measure_server(workload, chosen[workload])
            save(facts)
    return facts


def can(engine: str, workload: Workload | ServerWorkload) -> bool:
    """Whether the engine has the workload: servers are few, and stock `torch.compile` is measured at starts alone."""
    if isinstance(workload, ServerWorkload):
        return engine in SERVERS
    return engine != "torch-compile" or workload.measure == "first_token"


def write(out: Path, facts: dict[str, Any]) -> None:
    """The result's file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")


def names(text: str, known: Iterable[str], what: str) -> list[str]:
    """The names in a list with commas. Raises ValueError for one that isn't known."""
    found = [name for name in text.split(",") if name]
    for name in found:
        if name not in known:
            raise ValueError(f"there is no {what} {name!r}; known: {', '.join(known)}")
    return found


def chosen_workloads(options: argparse.Namespace) -> list[Workload | ServerWorkload]:
    """The workloads that the flags ask for, with their sizes. Raises ValueError."""
    offline = replace(WORKLOADS["offline"], num_requests=options.offline_requests)
    levels = tuple(int(level) for level in options.concurrency.split(","))
    server = replace(SERVER, concurrency=levels, rounds=options.rounds, min_requests=options.min_requests)
    known: dict[str, Workload | ServerWorkload] = {**WORKLOADS, "offline": offline, "server": server}
    return [known[name] for name in names(options.workloads, known, "workload")]


def chosen_engines(options: argparse.Namespace) -> list[str]:
    """The engines that the flags ask for and that can run; says which can't. Raises ValueError."""
    engines = names(options.engines, ENGINES, "engine")
    if options.vllm_python is None and (skipped := [engine for engine in engines if engine in VLLM_ENGINES]):
        print(f"skipped: {', '.join(skipped)} (no --vllm-python was given)", file=sys.stderr)
        engines = [engine for engine in engines if engine not in VLLM_ENGINES]
    return engines


def chosen_to_leave_out(options: argparse.Namespace) -> frozenset[tuple[str, str]]:
    """Pairs of workload and engine. Raises ValueError."""
    pairs = [pair.partition(":")[::2] for pair in options.leave_out.split(",") if pair]
    for workload, engine in pairs:
        names(workload, [*WORKLOADS, "server"], "workload")
        names(engine, ENGINES, "engine")
    return frozenset(pairs)


def main() -> int:
    """Runs what the flags ask for, writes bench/results/DATE-SHAPE[-NAME].json, prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="135m", choices=sorted(SHAPES))
    parser.add_argument("--workloads", default=",".join([*WORKLOADS, "server"]))
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--server-repeats", type=int, help="of servers, where they are fewer")
    parser.add_argument("--offline-requests", type=int, default=64, help="fewer than 64 where time is short")
    parser.add_argument("--concurrency", default="1,8,32", help="the server's levels")
    parser.add_argument("--rounds", type=int, default=3, help="requests of a server's level for each client")
    parser.add_argument("--min-requests", type=int, default=8, help="least requests of a server's level")
    parser.add_argument("--leave-out", default="", help="WORKLOAD:ENGINE pairs, with commas between")
    parser.add_argument(
        "--vllm-python",
        type=Path,
        default=os.environ.get("BENCH_VLLM_PYTHON"),
        help="the interpreter of an environment that has vLLM (default: $BENCH_VLLM_PYTHON)",
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each process, and each server level")
    parser.add_argument("--name", default="", help="ends the file's name, where a day has several runs of a shape")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    stem = "-".join(part for part in (date.today().isoformat(), options.shape, options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        parser.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    try:
        workloads, engines = chosen_workloads(options), chosen_engines(options)
        left_out = chosen_to_leave_out(options)
        if options.vllm_python is not None:
            vllm_versions(options.vllm_python)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what runs is ended, folders are removed
    with tempfile.TemporaryDirectory(prefix="onegraph-bench-") as folder:
        facts = measure(
            options.shape,
            workloads,
            engines,
            options.repeats,
            options.timeout,
            Path(folder),
            vllm_python=options.vllm_python,
            server_repeats=options.server_repeats,
            left_out=left_out,
            save=lambda facts: write(out, facts),
        )
    print(text_table(facts))
    print()
    print(markdown_table(facts))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
