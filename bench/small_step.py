"""What a decode step costs beside its kernels: few tokens through 30 layers that are too small to matter, as JSON.

usage: python -m bench.small_step [--shape toy-30] [--dtype float32] [--threads 1] [--ways NAME ...]
                                  [--requests 1 ...] [--tokens 64] [--rounds 8] [--name NAME] [--out FILE]

All ways of running stand in one process and generate in turns, so many requests at once; the time is that of the
model's call within a step in which each of them decodes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.__main__ import RESULTS, environment
from bench.figures import summary
from bench.models import SHAPES, make_model
from onegraph import LLM, SamplingParams

WAYS: dict[str, Any] = {
    "onegraph": None,
    "onegraph, unrecorded": {"cudagraph_mode": "NONE"},
    "onegraph, recorded at the start": {"cudagraph_mode": "FULL_DECODE_ONLY"},
    "onegraph, pieces recorded": {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [1]},
    "unrecorded, memory unplanned": {"cudagraph_mode": "NONE", "plan_memory": False},
    "unrecorded, one piece": {"cudagraph_mode": "NONE", "splitting_ops": []},
    "unrecorded, sizes of their own": {"cudagraph_mode": "NONE", "compile_sizes": [1]},
    "torch.compile": {"mode": "STOCK_TORCH_COMPILE"},
    "eager": {"mode": "NONE"},
}


class Steps:
    """An engine whose model calls are timed."""

    def __init__(self, folder: Path, config: Any, dtype: str) -> None:
        self.llm = LLM(str(folder), num_kv_blocks=64, max_model_len=256, compilation_config=config, dtype=dtype)
        self.microseconds: list[float] = []
        runner = self.llm.engine._runner
        runner._forward = self._timed(runner._forward)

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = forward(*args, **kwargs)
            self.microseconds.append(1e6 * (time.perf_counter() - began))
            return result

        return timed

    def decode(self, num_requests: int, num_tokens: int) -> list[float]:
        """Microseconds of each call in which all requests had one token."""
        self.microseconds.clear()
        greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        prompts = [{"prompt_token_ids": [7 + number, 8, 9]} for number in range(num_requests)]
        self.llm.generate(prompts, greedy, use_tqdm=False)
        return self.microseconds[1:]


def measure(engines: dict[str, Steps], num_requests: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    """Median and spread of each way's steps with so many requests; the ways take turns."""
    for engine in engines.values():
        engine.decode(num_requests, 12)
    found: dict[str, list[float]] = {way: [] for way in engines}
    for number in range(rounds):
        for way in list(engines) if number % 2 == 0 else list(reversed(engines)):
            found[way] += engines[way].decode(num_requests, num_tokens)
    return {way: {k: v for k, v in summary(times).items() if k != "all"} for way, times in found.items()}


def main() -> int:
    """Runs the rounds, writes bench/results/DATE-small-step[-NAME].json, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.small_step", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="toy-30", choices=list(SHAPES))
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="what to compare")
    parser.add_argument("--requests", type=int, nargs="+", default=[1], help="that decode at once")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--name", default="", help="ends the file's name, where a day has several runs")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    stem = "-".join(part for part in (date.today().isoformat(), "small-step", options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        parser.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="onegraph-bench-") as folder:
        make_model(options.shape, Path(folder))
        engines = {way: Steps(Path(folder), WAYS[way], options.dtype) for way in options.ways}
        by_requests = {num: measure(engines, num, options.tokens, options.rounds) for num in options.requests}
    given = {"shape": options.shape, "dtype": options.dtype, "threads": options.threads}
    facts = {"environment": environment(), **given, "microseconds_of_a_decode_step": by_requests}
    out.write_text(json.dumps(facts, indent=1) + "\n")
    for num, steps in by_requests.items():
        first = steps[options.ways[0]]["median"]
        for way, one in steps.items():
            print(f"{num:>4} requests  {way:<32}{one['median']:>10.0f} µs  ({one['median'] / first:.2f}x)")
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
