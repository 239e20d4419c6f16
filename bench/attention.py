"""The attention kernel beside its reference and beside SDPA on gathered, padded keys and values.

usage: python -m bench.attention [--rounds 12] [--threads 2] [--name NAME] [--out FILE]

Decode: SDPA gathers each request's blocks into tensors padded to the longest, as an engine on it would on each step.
Prefill without a past: SDPA reads contiguous tensors, with `is_causal`, and gathers nothing. All are called in turns
in one process. `wall` is what a caller waits; `cpu` is the calling thread's own time, which other load on the machine
changes less, and is whole only with one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import onegraph.ops  # noqa: F401 - registers the ops
from bench.__main__ import RESULTS, environment
from onegraph.api import open_store
from onegraph.op_kernels import install_op_kernels
from onegraph.ops.attention import paged_attention as reference
from onegraph.targets import target_for

BLOCK_SIZE = 16
HEADS = ((9, 3, 64), (16, 8, 128))
CASES = {
    "decode 1 x 256": (1, 1, 256),
    "decode 16 x 256": (16, 1, 256),
    "decode 64 x 256": (64, 1, 256),
    "decode 1 x 4096": (1, 1, 4096),
    "prefill 1 x 512": (1, 512, 512),
    "prefill 4 x 128": (4, 128, 128),
}
"""Requests, new tokens of each, context of each."""


def inputs(case: tuple[int, int, int], heads: tuple[int, int, int], dtype: torch.dtype) -> tuple[Any, ...]:
    """The op's arguments, with shuffled blocks."""
    (requests, new, context), (num_heads, shared, size) = case, heads
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(requests * blocks).view(requests, blocks).int()
    k_cache, v_cache = (torch.randn(requests * blocks, BLOCK_SIZE, shared, size).to(dtype) for _ in range(2))
    starts = torch.arange(requests + 1, dtype=torch.int32) * new
    lengths = torch.full((requests,), context, dtype=torch.int32)
    q = torch.randn(requests * new, num_heads, size).to(dtype)
    return q, k_cache, v_cache, tables, starts, lengths, size**-0.5, None, None, None


def sdpa(arguments: tuple[Any, ...]) -> Callable[[], torch.Tensor]:
    """SDPA as a function without arguments that gives [R, H, Q, D]."""
    q, k_cache, v_cache, tables, _, lengths, scale, *_ = arguments
    requests = len(lengths)
    queries = q.view(requests, -1, *q.shape[1:]).transpose(1, 2).contiguous()

    def gathered(cache: torch.Tensor) -> torch.Tensor:
        return cache[tables.long()].flatten(1, 2).transpose(1, 2)

    if queries.shape[2] > 1:
        keys, values = gathered(k_cache).contiguous(), gathered(v_cache).contiguous()
        return lambda: functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )

    def decode() -> torch.Tensor:
        keys, values = gathered(k_cache), gathered(v_cache)
        seen = (torch.arange(keys.shape[2]) < lengths[:, None])[:, None, None]
        return functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, scale=scale, enable_gqa=True
        )

    return decode


def timed(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds per call by wall clock and by the thread's own clock: minimum, median and quartiles."""
    clocks = {"wall": time.perf_counter, "cpu": time.thread_time}
    times: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in clocks} for name in functions}
    names = list(functions)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = {clock: read() for clock, read in clocks.items()}
            functions[name]()
            for clock, read in clocks.items():
                times[name][clock].append((read() - began[clock]) * 1e6)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, by_clock in times.items():
        found[name] = {}
        for clock, values in by_clock.items():
            quarter, median, three = statistics.quantiles(values, n=4)
            found[name][clock] = {
                "min": round(min(values), 1),
                "median": round(median, 1),
                "q1": round(quarter, 1),
                "q3": round(three, 1),
            }
    return found


def main() -> int:
    """Measures, writes bench/results/DATE-attention[-NAME].json, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="", help="ends the file's name, where a day has several runs")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    stem = "-".join(part for part in (date.today().isoformat(), "attention", options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        parser.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    torch.set_num_threads(options.threads)
    found = install_op_kernels(target_for("cpu"), open_store())
    if not found.is_installed:
        parser.error(found.why)
    facts: dict[str, Any] = {"environment": environment(), "rounds": options.rounds, "microseconds": {}}
    clock = "cpu" if options.threads == 1 else "wall"
    print(f"median µs by {clock} clock, {options.threads} threads")
    with torch.inference_mode():
        for heads in HEADS:
            for dtype in (torch.float32, torch.bfloat16):
                for name, case in CASES.items():
                    title = f"{name}, {heads[0]}/{heads[1]} heads of {heads[2]}, {str(dtype).removeprefix('torch.')}"
                    arguments = inputs(case, heads, dtype)
                    padded = sdpa(arguments)
                    functions: dict[str, Callable[[], Any]] = {
                        "kernel": lambda given=arguments: torch.ops.onegraph.paged_attention(*given),
                        "reference": lambda given=arguments: reference(*given),
                        "sdpa": padded,
                    }
                    expected = padded().transpose(1, 2).reshape(arguments[0].shape)
                    torch.testing.assert_close(functions["kernel"](), expected, atol=2e-2, rtol=2e-2)
                    times = timed(functions, options.rounds)
                    facts["microseconds"][title] = times
                    kernel, ref, other = (times[one][clock]["median"] for one in functions)
                    print(
                        f"{title:<52} kernel {kernel:>9.0f}  reference {ref:>9.0f}  sdpa {other:>9.0f}"
                        f"  sdpa / kernel {other / kernel:.2f}",
                        flush=True,
                    )
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"written: {out.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
