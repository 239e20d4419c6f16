"""What each of the seven switches costs: tokens/s of one request that decodes with a part of onegraph switched off.

usage: python -m bench.switches [--shape 135m] [--dtype bfloat16] [--threads 1] [--tokens 48] [--rounds 6] [--starts 3]
                                [--name NAME] [--out FILE]

All settings stand in one process and generate in turns, so that other load meets them alike; a round's ratio is that of
a setting's tokens/s to those of onegraph as it is in the same round. Seconds are the process's own, which other load
doesn't stretch; with more than one thread they would count the threads that wait. The cache costs nothing once a model
runs: its switch is measured at starts, in processes of their own, with a cache that an earlier start has filled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.__main__ import RESULTS, environment
from bench.figures import summary
from bench.models import SHAPES, make_model
from bench.processes import run_in_own_group, variables
from onegraph import LLM, SamplingParams
from onegraph.passes.catalogue import CATALOGUE

AS_IT_IS = "onegraph"
PASSES = tuple(one.kind.name for one in CATALOGUE)
SWITCHES: dict[str, dict[str, Any]] = {
    AS_IT_IS: {},
    "--enforce-eager": {"enforce_eager": True},
    "-O.mode=0": {"compilation_config": {"mode": 0}},
    "-O.cudagraph_mode=NONE": {"compilation_config": {"cudagraph_mode": "NONE"}},
    "-O.backend=eager": {"compilation_config": {"backend": "eager"}},
    "-O.backend=aot_eager": {"compilation_config": {"backend": "aot_eager"}},
    "-O.passes.merge_linears=false": {"compilation_config": {"passes": {"merge_linears": False}}},
    "-O.passes.select_linear_kernels=false": {"compilation_config": {"passes": {"select_linear_kernels": False}}},
    "all passes off": {"compilation_config": {"passes": dict.fromkeys(PASSES, False)}},
    "-O.eager_pieces=[2]": {"compilation_config": {"eager_pieces": [2]}},
}
"""As they are typed, and as `LLM` takes them."""
STARTS: dict[str, dict[str, str]] = {
    AS_IT_IS: {},
    "ONEGRAPH_DISABLE_COMPILE_CACHE=1": {"ONEGRAPH_DISABLE_COMPILE_CACHE": "1"},
}
PROMPT = [7, 8, 9]
BEFORE = 16
"""Tokens that are generated before anything is measured: batches are recorded when they come for the 8th time."""


def rates(llm: LLM, num_tokens: int) -> tuple[float, float]:
    """Tokens per second, and per second of the process's own time, of one request from its first step to its last."""
    greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    began, own = time.perf_counter(), time.process_time()
    llm.generate({"prompt_token_ids": PROMPT}, greedy, use_tqdm=False)
    return num_tokens / (time.perf_counter() - began), num_tokens / (time.process_time() - own)


def measure(model: Path, dtype: str, num_tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens/s of each setting, and the ratio to onegraph as it is, round by round."""
    engines = {name: LLM(str(model), dtype=dtype, num_kv_blocks=64, **given) for name, given in SWITCHES.items()}
    for llm in engines.values():
        rates(llm, BEFORE)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for number in range(rounds):
        for name in list(engines) if number % 2 == 0 else list(reversed(engines)):
            found[name].append(rates(engines[name], num_tokens))
    own = {name: [one for _, one in measured] for name, measured in found.items()}
    return {
        name: {
            "tokens_per_s": summary([one for one, _ in measured]),
            "tokens_per_s_of_own_time": summary(own[name]),
            "ratio": ratios(own[AS_IT_IS], own[name]),
        }
        for name, measured in found.items()
    }


def ratios(baseline: list[float], found: list[float]) -> dict[str, Any]:
    """Median and spread of the rounds' ratios; above 1 is faster than the baseline."""
    return summary([one / first for first, one in zip(baseline, found, strict=True)])


def measure_starts(model: Path, dtype: str, repeats: int, cache: Path) -> dict[str, Any]:
    """Seconds of `onegraph run` to its first token and its end, with the cache and without; alternating."""
    command = [sys.executable, "-m", "onegraph.cli.main", "run", str(model), f"--dtype={dtype}", "--num-kv-blocks=64"]
    command += ["--prompt=a", "--max-tokens=1"]
    found: dict[str, list[float]] = {name: [] for name in STARTS}
    for number in range(repeats + 1):  # the first one fills the cache
        for name, given in STARTS.items() if number else [(AS_IT_IS, {})]:
            began = time.perf_counter()
            code, _, errors = run_in_own_group(command, {**variables(AS_IT_IS, cache, None), **given}, 600)
            if code != 0:
                raise RuntimeError(f"{name}: {errors[-500:]}")
            if number:
                found[name].append(time.perf_counter() - began)
    slower = statistics.median(found["ONEGRAPH_DISABLE_COMPILE_CACHE=1"]) / statistics.median(found[AS_IT_IS])
    return {**{name: summary(seconds) for name, seconds in found.items()}, "times_as_long": round(slower, 2)}


def main() -> int:
    """Runs the rounds, writes bench/results/DATE-switches[-NAME].json, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.switches", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="135m", choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", help="of the model")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--tokens", type=int, default=48, help="of a request")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--starts", type=int, default=3, help="starts with and without the cache; 0 leaves them out")
    parser.add_argument("--name", default="", help="ends the file's name, where a day has several runs")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    stem = "-".join(part for part in (date.today().isoformat(), "switches", options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        parser.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="onegraph-bench-") as folder:
        model = make_model(options.shape, Path(folder) / "model")
        facts: dict[str, Any] = {"environment": environment(), "shape": options.shape, "dtype": options.dtype}
        if options.starts:
            facts["seconds_of_a_start"] = measure_starts(model, options.dtype, options.starts, Path(folder) / "cache")
        facts["decode_of_one_request"] = measure(model, options.dtype, options.tokens, options.rounds)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    for name, one in facts["decode_of_one_request"].items():
        ratio = one["ratio"]
        speed = one["tokens_per_s_of_own_time"]["median"]
        print(f"{name:<40}{speed:>8.1f} tokens/s  {ratio['median']:.2f} ± {ratio['iqr']:.2f}")
    for name, one in facts.get("seconds_of_a_start", {}).items():
        print(f"{name:<40}{one['median']:>8.1f} s" if isinstance(one, dict) else f"{name:<40}{one:>8.1f}")
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
