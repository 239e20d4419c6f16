"""Whether one run of the C++ compiler should build the kernels of several pieces: its seconds, apart and together.

usage: python -m bench.one_build [--shape 135m] [--layers 12,30,60] [--repeats 3] [--out FILE]

Compiles a model in bf16 for the kernels of its distinct pieces. Then these are built as one library for each piece, one
after the other and all at once, and as one library for all. CPU seconds are those of the compiler's processes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

from bench.__main__ import RESULTS, environment
from bench.figures import summary
from bench.models import SHAPES, make_model
from onegraph.ir.target import KernelBuild, KernelSource
from onegraph.targets.cpu.target import CpuTarget

Pieces = Sequence[Sequence[KernelSource]]


def kernels_of_pieces(folder: str) -> Pieces:
    """What the pieces of a model are made of, for each library that a start with an empty cache builds."""
    import onegraph

    found: list[Sequence[KernelSource]] = []
    build = CpuTarget.start_build

    def start_build(self: CpuTarget, kernels: Sequence[KernelSource]) -> KernelBuild:
        found.append(kernels)
        return build(self, kernels)

    with (
        mock.patch.object(CpuTarget, "start_build", start_build),
        mock.patch.dict(os.environ, {"ONEGRAPH_DISABLE_COMPILE_CACHE": "1"}),
    ):
        onegraph.LLM(folder, num_kv_blocks=64, max_num_batched_tokens=256, max_num_seqs=16, max_model_len=512)
    return found


def renamed(pieces: Pieces) -> list[KernelSource]:
    """The kernels of all pieces under names of their own: each piece counts its kernels from 0."""
    return [
        KernelSource(f"piece_{number}_{kernel.name}", kernel.argtypes, kernel.source)
        for number, kernels in enumerate(pieces)
        for kernel in kernels
    ]


def one_after_the_other(pieces: Pieces) -> None:
    for kernels in pieces:
        CpuTarget().start_build(kernels).files()


def all_at_once(pieces: Pieces) -> None:
    with ExitStack() as running:
        builds = [CpuTarget().start_build(kernels) for kernels in pieces]
        for build in builds:
            running.callback(build.cancel)
        for build in builds:
            build.files()


def together(pieces: Pieces) -> None:
    CpuTarget().start_build(renamed(pieces)).files()


WAYS: dict[str, Callable[[Pieces], None]] = {
    "one after the other": one_after_the_other,
    "all at once": all_at_once,
    "together": together,
}


def measured(build: Callable[[Pieces], None], pieces: Pieces) -> tuple[float, float]:
    """Seconds, and CPU seconds of the processes that ended meanwhile."""
    before, began = os.times(), time.perf_counter()
    build(pieces)
    after, seconds = os.times(), time.perf_counter() - began
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, spent


def main() -> int:
    """Runs the repeats in turns, writes bench/results/DATE-one-build.json, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.one_build", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="135m", choices=list(SHAPES))
    parser.add_argument("--layers", default="12,30,60")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for layers in map(int, arguments.layers.split(",")):
        with tempfile.TemporaryDirectory(prefix="onegraph-bench-") as folder:
            model = make_model(arguments.shape, Path(folder) / "model", num_layers=layers)
            pieces = kernels_of_pieces(str(model))
        runs: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(arguments.repeats):
            for way, build in WAYS.items():
                runs[way].append(measured(build, pieces))
        kernels = renamed(pieces)
        distinct = len({(kernel.source, kernel.argtypes) for kernel in kernels})
        row: dict[str, Any] = {
            "layers": layers,
            "libraries": len(pieces),
            "kernels": len(kernels),
            "distinct_kernels": distinct,
        }
        for way, figures in runs.items():
            row[way] = {
                "seconds": summary([seconds for seconds, _ in figures]),
                "cpu_seconds": summary([spent for _, spent in figures]),
            }
            shown = f"{row[way]['seconds']['median']:5.1f} s, {row[way]['cpu_seconds']['median']:5.1f} CPU s"
            print(f"{layers} layers, {len(pieces)} libraries, {way:20s} {shown}", flush=True)
        rows.append(row)
    out = arguments.out or RESULTS / f"{date.today().isoformat()}-one-build.json"
    out.write_text(json.dumps({"environment": environment(), "shape": arguments.shape, "rows": rows}, indent=1) + "\n")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
