"""What a step costs beside its kernels: one token through 30 layers that are too small to matter, as JSON.

usage: python -m bench.small_step [--shape toy-30] [--tokens 64] [--rounds 8] [--name NAME] [--out FILE]

All ways of running stand in one process and generate in turns, one request each; the time is that of the model's call
within a decode step, whose own arithmetic is microseconds.
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

from bench.__main__ import RESULTS, environment
from bench.figures import summary
from bench.models import SHAPES, make_model
from onegraph import LLM, SamplingParams

WAYS: dict[str, Any] = {
    "onegraph": None,
    "onegraph, one piece": {"splitting_ops": []},
    "onegraph, sizes of their own": {"compile_sizes": [1]},
    "torch.compile": {"mode": "STOCK_TORCH_COMPILE"},
    "eager": {"mode": "NONE"},
}


class Steps:
    """An engine whose model calls are timed."""

    def __init__(self, folder: Path, config: Any) -> None:
        self.llm = LLM(str(folder), num_kv_blocks=64, max_model_len=256, compilation_config=config)
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

    def decode(self, num_tokens: int) -> list[float]:
        """Microseconds of each call that had one token."""
        self.microseconds.clear()
        greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        self.llm.generate({"prompt_token_ids": [7, 8, 9]}, greedy, use_tqdm=False)
        return self.microseconds[1:]


def main() -> int:
    """Runs the rounds, writes bench/results/DATE-small-step[-NAME].json, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.small_step", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="toy-30", choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--name", default="", help="ends the file's name, where a day has several runs")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    stem = "-".join(part for part in (date.today().isoformat(), "small-step", options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        parser.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    with tempfile.TemporaryDirectory(prefix="onegraph-bench-") as folder:
        make_model(options.shape, Path(folder))
        engines = {way: Steps(Path(folder), config) for way, config in WAYS.items()}
        for engine in engines.values():
            engine.decode(8)
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(options.rounds):
            for way in list(WAYS) if number % 2 == 0 else list(reversed(WAYS)):
                found[way] += engines[way].decode(options.tokens)
    steps = {way: {k: v for k, v in summary(times).items() if k != "all"} for way, times in found.items()}
    facts = {"environment": environment(), "shape": options.shape, "microseconds_of_a_step_with_one_token": steps}
    out.write_text(json.dumps(facts, indent=1) + "\n")
    for way, one in steps.items():
        print(f"{way:<30}{one['median']:>10.0f} µs  ({one['median'] / steps['onegraph']['median']:.2f}x)")
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
