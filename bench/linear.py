"""Linear layers beside the speed of reading their weights: PyTorch's kernel, oneDNN's packed one, and onegraph's.

usage: python -m bench.linear [--rounds 7] [--threads 2] [--mib 256] [--shapes 3072x576,...] [--tries 5] [--name NAME]

For each shape as many weights as a model has, which no cache of a core holds, are each multiplied once in a round; ways
take turns, in one process. `read` reads the same weights and does nothing else: what a step takes at the least.
`packed` is oneDNN's kernel, where it has one, on weights that it has reordered before, which isn't timed. `vector`,
`blocked` and `amx` are onegraph's kernels, on the weights as they lie, and `chosen` is the op with its own choices.
Figures are of the median; times have quartiles and the minimum too.

Other load makes threads wait for each other. `threads_answer_us` says how long a small shared loop took, before and
after; where that tells of other load, the point is measured again, up to `--tries` times, and the file has the try in
which threads answered fastest. With one thread, times are the thread's own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
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
from onegraph.ir.linear import PLAIN, TOKENS, LinearOp, LinearShape
from onegraph.linear_kernels import measure
from onegraph.op_kernels import install_op_kernels
from onegraph.ops.library import implementation
from onegraph.targets import target_for
from onegraph.torch_compat import toolchain

SHAPES = ("960x576", "576x576", "3072x576", "576x1536", "49152x576", "4096x1024", "1024x3072", "6144x1024")
"""Outputs by inputs: a 135M Llama's with merged projections and its head, and Qwen3-0.6B's."""
MAX_VECTOR_TOKENS = 16
CALM_US = 300

READER = """
#include <cstdint>
typedef uint64_t Words __attribute__((vector_size(64), aligned(8), may_alias));
extern "C" uint64_t read_all(const char* from, int64_t bytes, int64_t threads) {
  uint64_t result = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : result)
  for (int64_t block = 0; block < bytes / 4096; block++) {
    const Words* words = reinterpret_cast<const Words*>(from + block * 4096);
    Words sum[4] = {};
    for (int i = 0; i < 64; i += 4)
      for (int j = 0; j < 4; j++) sum[j] ^= words[i + j];
    const Words all = (sum[0] ^ sum[1]) ^ (sum[2] ^ sum[3]);
    for (int i = 0; i < 8; i++) result ^= all[i];
  }
  return result;
}
"""


def reader() -> Callable[[torch.Tensor], Any]:
    """A function that reads a tensor's memory with all threads."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "reader.cpp"
        source.write_text(READER)
        command, library = toolchain.compile_command([str(source)], "reader", Path(folder))
        subprocess.run(command, check=True, cwd=folder, capture_output=True)
        read = ctypes.CDLL(str(library)).read_all
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64], ctypes.c_uint64
    return lambda tensor: read(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads())


def ways(
    op: LinearOp, read: Callable[[torch.Tensor], Any], weights: list[torch.Tensor], tokens: int
) -> dict[str, Callable[[], Any]]:
    """By name what goes through all weights once; onegraph's are compared with PyTorch's."""
    (outputs, inputs), dtype = weights[0].shape, weights[0].dtype
    x, out = torch.randn(tokens, inputs).to(dtype), torch.empty(tokens, outputs, dtype=dtype)
    found: dict[str, Callable[[], Any]] = {
        "read": lambda: [read(weight) for weight in weights],
        "plain": lambda: [functional.linear(x, weight) for weight in weights],
        "chosen": lambda: [op(x, weight, None, out=out) for weight in weights],
    }
    if dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, tokens) for weight in weights]
        linear = torch.ops.mkldnn._linear_pointwise
        found["packed"] = lambda: [linear(x, weight, None, "none", [], "") for weight in packed]
    for name in op.kernels(dtype):
        if name != PLAIN and (name != "vector" or tokens <= MAX_VECTOR_TOKENS):
            found[name] = lambda name=name: [op.run(name, x, weight, out) for weight in weights]
    expected = functional.linear(x, weights[-1])
    for name in found.keys() - {"read", "plain", "packed"}:
        found[name]()
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
    return found


def timed(functions: dict[str, Callable[..., Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each: minimum, median and quartiles."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for function in functions.values():
        function()
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = clock()
            functions[name]()
            times[name].append(clock() - began)
    found = {}
    for name, values in times.items():
        q1, median, q3 = statistics.quantiles(values, n=4)
        found[name] = {"min": min(values), "q1": q1, "median": median, "q3": q3}
    return found


def threads_answer_us() -> float:
    """The median microseconds of a small loop that is shared among threads."""
    some, times = torch.ones(1 << 17), []
    for _ in range(15):
        began = time.perf_counter()
        some.add_(1)
        times.append((time.perf_counter() - began) * 1e6)
    return round(statistics.median(times), 1)


def calm_times(
    functions: dict[str, Callable[..., Any]], rounds: int, tries: int
) -> tuple[dict[str, dict[str, float]], list[float]]:
    """The times of the calmest try, and how fast threads answered before and after it."""
    found = []
    for _ in range(tries):
        before = threads_answer_us()
        times = timed(functions, rounds)
        found.append((times, [before, threads_answer_us()]))
        if max(found[-1][1]) < CALM_US:
            break
        time.sleep(1)
    return min(found, key=lambda one: max(one[1]))


def figures(times: dict[str, dict[str, float]], num_bytes: int, operations: int) -> dict[str, dict[str, Any]]:
    """Each way's seconds, and what they come to."""
    return {
        name: {
            "ms": {which: round(seconds * 1e3, 3) for which, seconds in spread.items()},
            "gb_per_s": round(num_bytes / spread["median"] / 1e9, 2),
            "gflop_per_s": 0.0 if name == "read" else round(operations / spread["median"] / 1e9, 1),
            "share_of_read": round(times["read"]["median"] / spread["median"], 3),
        }
        for name, spread in times.items()
    }


def main() -> int:
    """Measures, writes bench/results/DATE-linear[-NAME].json, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.linear", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--mib", type=int, default=256, help="of weights for each shape")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="outputs by inputs")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--name", default="", help="ends the file's name, where a day has several runs")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    stem = "-".join(part for part in (date.today().isoformat(), "linear", options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        parser.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    torch.set_num_threads(options.threads)
    installed = install_op_kernels(target_for("cpu"), open_store())
    op = implementation("linear", target_for("cpu").dispatch_key)
    if not isinstance(op, LinearOp):
        parser.error(installed.why)
    read, dtype = reader(), getattr(torch, options.dtype)
    facts: dict[str, Any] = {"environment": environment(), "rounds": options.rounds, "shapes": {}}
    print(f"median GB/s of weights ({options.dtype}, {options.threads} threads), and the share of reading alone")
    with torch.inference_mode():
        for text in options.shapes.split(","):
            outputs, inputs = map(int, text.split("x"))
            began = time.perf_counter()
            (choice,) = measure([LinearShape(outputs, inputs, dtype)], op)
            seconds = time.perf_counter() - began
            op.choose(choice.shape, choice.kernels)
            size = outputs * inputs
            pool = (torch.randn(max(1, (options.mib << 20) // dtype.itemsize // size), size) * 0.05).to(dtype)
            facts["shapes"][text] = {
                "weights": len(pool),
                "bytes": pool.nbytes,
                "seconds_to_choose": round(seconds, 3),
                "choice": choice.to_dict()["tokens"],
                "was_measured": choice.is_measured,
                "tokens": {},
            }
            for tokens in TOKENS:
                functions = ways(op, read, [one.view(outputs, inputs) for one in pool], tokens)
                times, answers = calm_times(functions, options.rounds, options.tries)
                found = figures(times, pool.nbytes, 2 * tokens * pool.numel())
                facts["shapes"][text]["tokens"][tokens] = {"threads_answer_us": answers, "ways": found}
                columns = "  ".join(
                    f"{name} {one['gb_per_s']:5.1f} ({one['share_of_read']:4.0%})" for name, one in found.items()
                )
                print(f"{text:>11} {tokens:>4} tokens  {columns}", flush=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"written: {out.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
