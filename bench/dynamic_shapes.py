"""How sizes are traced: seconds to build and microseconds per call of the three modes, on a small decoder, as JSON.

usage: python -m bench.dynamic_shapes [--repeats 3] [--rounds 40] [--name NAME] [--out FILE]

Each repeat is a process of its own, with empty compile caches, in which all modes are built (in turns: each is first
once in three repeats, after one unmeasured compile of something else) and then called in turns, so that other load
meets all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from bench.__main__ import RESULTS, environment

MODES = ("unbacked", "backed", "backed_size_oblivious")
SIZES = (1, 8, 64, 512)
LAYERS, HIDDEN, HEADS, MAX_TOKENS = 5, 64, 4, 1024


class Layer(nn.Module):
    """RMSNorm, causal attention over the call's own tokens, gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)])
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.gate_up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(0, 1)[None] for part in parts)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended[0].transpose(0, 1).flatten(1))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        mixed: torch.Tensor = x + self.down(nn.functional.silu(gate) * up)
        return mixed


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(256, HIDDEN), nn.Embedding(MAX_TOKENS, HIDDEN)
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embed(ids) + self.positions(positions)
        for layer in self.layers:
            x = layer(x)
        return x


def inputs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(size) % 256, torch.arange(size)


def measure_once(first: int, rounds: int) -> dict[str, Any]:
    """One repeat, in this process: `{mode: {"build_s", "artifacts", "call_us": {size: median of rounds}}}`."""
    import onegraph

    tokens = Dim("num_tokens", min=1, max=MAX_TOKENS)
    shapes = {"ids": {0: tokens}, "positions": {0: tokens}}
    onegraph.compile(torch.nn.Linear(4, 4))(torch.ones(2, 4))
    torch.manual_seed(0)
    module = Decoder().eval()
    models: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        for mode in MODES[first:] + MODES[:first]:
            with tempfile.TemporaryDirectory(prefix="onegraph-bench-") as root:
                os.environ["ONEGRAPH_CACHE_ROOT"] = root
                models[mode] = onegraph.compile(module, dynamic_shapes=shapes, config={"dynamic_shapes": mode})
                began = time.perf_counter()
                models[mode].warm_up(*inputs(5))
                seconds = time.perf_counter() - began
            artifacts = len(models[mode].explain().pieces[0].ranges)
            found[mode] = {"build_s": round(seconds, 3), "artifacts": artifacts, "call_us": {}}
        for size in SIZES:
            arguments = inputs(size)
            expected = module(*arguments)
            for model in models.values():
                torch.testing.assert_close(model(*arguments), expected, rtol=1e-4, atol=1e-4)
            times: dict[str, list[float]] = {mode: [] for mode in MODES}
            for number in range(rounds):
                for mode in MODES[number % 3 :] + MODES[: number % 3]:
                    model = models[mode]
                    began = time.perf_counter()
                    for _ in range(10):
                        model(*arguments)
                    times[mode].append((time.perf_counter() - began) * 1e5)
            for mode in MODES:
                found[mode]["call_us"][str(size)] = round(statistics.median(times[mode]), 1)
    return found


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


def main() -> int:
    """Runs the repeats, writes bench/results/DATE-dynamic-shapes[-NAME].json, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.dynamic_shapes", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40, help="of ten calls of each mode at each size")
    parser.add_argument("--name", default="", help="ends the file's name, where a day has several runs")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--once", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once is not None:
        print(json.dumps(measure_once(options.once, options.rounds)))
        return 0
    stem = "-".join(part for part in (date.today().isoformat(), "dynamic-shapes", options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        parser.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    facts: dict[str, Any] = {"environment": environment()}
    repeats = []
    for number in range(options.repeats):
        asked = ["--once", str(number % 3), "--rounds", str(options.rounds)]
        words = [sys.executable, "-m", "bench.dynamic_shapes", *asked]
        result = subprocess.run(words, capture_output=True, text=True, timeout=600, check=True)
        repeats.append(json.loads(result.stdout.splitlines()[-1]))
    facts["decoder"] = {"layers": LAYERS, "hidden": HIDDEN, "heads": HEADS, "max_tokens": MAX_TOKENS}
    facts["modes"] = {
        mode: {
            "artifacts": repeats[0][mode]["artifacts"],
            "build_s": spread([repeat[mode]["build_s"] for repeat in repeats]),
            "call_us": {str(n): spread([repeat[mode]["call_us"][str(n)] for repeat in repeats]) for n in SIZES},
        }
        for mode in MODES
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{'mode':<22} {'build, s':>18} " + " ".join(f"{f'T={n}, µs':>22}" for n in SIZES))
    for mode, entry in facts["modes"].items():
        told = [f"{one['median']:.1f} ({one['min']:.1f}..{one['max']:.1f})" for one in entry["call_us"].values()]
        built = entry["build_s"]
        seconds = f"{built['median']:.1f} ({built['min']:.1f}..{built['max']:.1f})"
        print(f"{mode:<22} {seconds:>18} " + " ".join(f"{text:>22}" for text in told))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
