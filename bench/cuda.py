"""Decoding steps of Llama shapes on a GPU: eager, compiled, recorded in pieces and whole, against the memory's limit.

usage: python -m bench.cuda [--shapes llama-1b,llama-8b] [--requests 1,8,64,256] [--context 1024] [--budget-s 470]
                            [--name NAME]

One step is one call of the model on inputs that lie on the device, from the call to the end of its work there, as an
engine waits for it; `host_ms` is until the call returns. The limit is the time in which the measured copy bandwidth
moves the bytes of the weights and of the requests' keys and values once. Recordings are onegraph's own, in the memory
of the step's inputs. Behind the steps come tokens/s of generation, in processes of their own: onegraph's LLM, which
also tells what a step costs outside of the model; transformers' static cache with its decode step compiled; and its
continuous batching. What there is no time for in the budget is listed, not measured. The file is written as it grows.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.__main__ import RESULTS, environment
from bench.cuda_generation import ENGINES
from bench.figures import summary
from bench.models import SHAPES, make_config
from bench.processes import run_in_own_group, variables

BLOCK_SIZE = 16
MAX_TOKENS = 2048
SPARE_S = 10
"""Seconds of the budget that are left for writing and ending."""
RESERVED = 1.15
"""Memory that is asked for before a shape is measured, over its weights, keys and values."""
GENERATION_S = {"prepare": 20, "onegraph": 45, "transformers-compile": 60, "transformers-batching": 40}
"""An engine isn't begun with less than this left; none gets more than MOST_S."""
MOST_S = 150
COUNTS = {"transformers-compile": (1, 8)}
"""Of the numbers of requests, those that an engine is measured at: a static cache is compiled for each."""
PROMPT_LEN, OUTPUT_LEN = 128, 64


class Budget:
    """Seconds of the whole run."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + seconds

    def left(self) -> float:
        """Seconds until the run has to be over."""
        return self._end - self._now() - SPARE_S


def gpu() -> dict[str, Any]:
    """The device as torch reports it."""
    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "gpu_memory_gib": round(found.total_memory / 2**30, 1),
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
    }


def wait_for(device: str) -> None:
    """Until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: str, num_bytes: int = 2**32) -> float:
    """Bytes read and written in a second by a copy on the device, the best of ten."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(total for _, total in timed(lambda: target.copy_(source), 10, device))


def timed(step: Callable[[], Any], repeats: int, device: str) -> list[tuple[float, float]]:
    """Seconds until each call returns, and until its work on the device has ended; three calls go before."""
    seconds = []
    for i in range(repeats + 3):
        wait_for(device)
        began = time.perf_counter()
        step()
        returned = time.perf_counter()
        wait_for(device)
        if i >= 3:
            seconds.append((returned - began, time.perf_counter() - began))
    return seconds


def bytes_moved(weight_bytes: int, token_bytes: int, num_requests: int, context: int) -> int:
    """What a decoding step reads at least: the weights, and the keys and values of all tokens."""
    return weight_bytes + num_requests * context * token_bytes


def step_figures(seconds: list[tuple[float, float]], limit_ms: float) -> dict[str, Any]:
    """Milliseconds of a step and of its part on the host, and the limit's share of the step's median."""
    step = summary([1000 * total for _, total in seconds])
    host = summary([1000 * host for host, _ in seconds])
    return {**step, "host_ms": host["median"], "fraction_of_limit": round(limit_ms / step["median"], 4)}


def fitting(counts: list[int], weight_bytes: int, token_bytes: int, context: int, free_bytes: int) -> list[int]:
    """The numbers of requests whose weights, keys and values fit into the memory."""
    return [
        count for count in counts if RESERVED * bytes_moved(weight_bytes, token_bytes, count, context) <= free_bytes
    ]


def make_flat_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    """The model as onegraph calls it, with random weights, on the device."""
    from transformers import AutoModelForCausalLM

    from onegraph.models.attention import ATTENTION, register
    from onegraph.models.flat_model import FlatModel

    register()
    torch.manual_seed(0)
    with torch.inference_mode(False), torch.device(device):
        model = AutoModelForCausalLM.from_config(make_config(shape), dtype=dtype, attn_implementation=ATTENTION)
    return FlatModel(model.eval().requires_grad_(False))


def make_caches(config: Any, num_blocks: int, device: str, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Keys and values of each layer, random."""
    shape = (num_blocks, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
    return [
        tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(2)) for _ in range(config.num_hidden_layers)
    ]


def token_bytes_of(config: Any, dtype: torch.dtype) -> int:
    """Of the keys and values of one token in all layers."""
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize)


def decode_inputs(num_requests: int, context: int, caches: Any) -> dict[str, Any]:
    """One new token for each request, whose context with it has `context` tokens, in shuffled blocks."""
    device, blocks_each = caches[0][0].device, -(-context // BLOCK_SIZE)
    tables = torch.randperm(num_requests * blocks_each, device=device).int().view(num_requests, blocks_each)
    positions = torch.full((num_requests,), context - 1, device=device)
    slots = tables[:, -1].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
    return {
        "input_ids": torch.arange(1, num_requests + 1, device=device),
        "positions": positions,
        "slot_mapping": slots,
        "query_start_loc": torch.arange(num_requests + 1, device=device, dtype=torch.int32),
        "seq_lens": torch.full((num_requests,), context, device=device, dtype=torch.int32),
        "block_tables": tables.contiguous(),
        "logits_indices": torch.arange(num_requests, device=device),
        "kv_caches": caches,
    }


def compiled_model(
    flat: Any, name: str, example: dict[str, Any], max_requests: int, options: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """The compiled model, of which nothing is recorded yet, and the seconds of its stages."""
    import onegraph

    max_blocks = example["block_tables"].shape[1]
    compiled = onegraph.compile(
        flat,
        dynamic_shapes=flat.dynamic_shapes(MAX_TOKENS, max_requests, max_blocks, len(example["kv_caches"])),
        config={"cudagraph_mode": "FULL_AND_PIECEWISE", "backend": options.backend},
        own_module=True,
        name=name,
    )
    began = time.perf_counter()
    compiled(**example)
    wait_for(options.device)
    explained = compiled.explain()
    return compiled, {
        "start": explained.start,
        "seconds": round(time.perf_counter() - began, 3),
        "stages": {stage: round(took, 3) for stage, took in explained.stages},
    }


def measure_shape(
    shape: str, options: argparse.Namespace, budget: Budget, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """The shape's figures, again and again, with more each time."""
    from onegraph.op_kernels import install_op_kernels
    from onegraph.targets import target_for

    device, dtype, context = options.device, getattr(torch, options.dtype), options.context
    config = make_config(shape)
    flat = make_flat_model(shape, device, dtype)
    weight_bytes, token_bytes = sum(p.nbytes for p in flat.parameters()), token_bytes_of(config, dtype)
    target = target_for(device)
    free_bytes = target.available_bytes()
    counts = options.counts if free_bytes is None else fitting(
        options.counts, weight_bytes, token_bytes, context, free_bytes + weight_bytes
    )  # fmt: skip
    facts: dict[str, Any] = {
        "weight_bytes": weight_bytes,
        "kv_bytes_per_token": token_bytes,
        "compile": {},
        "steps": {},
        "left_out": [f"{count} requests: no memory" for count in options.counts if count not in counts],
    }
    yield facts
    if not counts:
        return
    caches = make_caches(config, max(counts) * -(-context // BLOCK_SIZE), device, dtype)
    install_op_kernels(target, None)
    example = decode_inputs(min(2, max(counts)), context, caches)
    flat(**example)  # has the attention kernels compiled
    with tempfile.TemporaryDirectory(prefix="onegraph-bench-cache-") as root, one_cache(Path(root)):
        compiled, facts["compile"]["cold"] = compiled_model(flat, "cold", example, max(counts), options)
        yield facts
        if budget.left() > 3 * facts["compile"]["cold"]["seconds"]:
            _, facts["compile"]["warm"] = compiled_model(flat, "warm", example, max(counts), options)
    for count in sorted(counts, reverse=True):  # recordings share memory: the largest first
        if budget.left() < 5:
            facts["left_out"].append(f"{count} requests: no time")
            continue
        moved = bytes_moved(weight_bytes, token_bytes, count, context)
        limit_ms = 1000 * moved / bandwidth
        facts["steps"][str(count)] = {
            "bytes": moved,
            "limit_ms": round(limit_ms, 4),
            **measure_steps(flat, compiled, decode_inputs(count, context, caches), limit_ms, options),
        }
        told = {name: found.get("median") for name, found in facts["steps"][str(count)]["engines"].items()}
        print(f"{shape}, {count} requests: limit {limit_ms:.3f} ms, {json.dumps(told)}", file=sys.stderr, flush=True)
        yield facts


def measure_steps(
    flat: Any, compiled: Any, inputs: dict[str, Any], limit_ms: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Each way of running one step: its figures, and whether what is recorded gives the same bits as compiled."""
    from onegraph.counters import counters

    def figures(step: Callable[[], Any]) -> dict[str, Any]:
        return step_figures(timed(step, options.repeats, options.device), limit_ms)

    found = {"eager": figures(lambda: flat(**inputs)), "compiled": figures(lambda: compiled(**inputs))}
    expected, count = compiled(**inputs).clone(), len(inputs["input_ids"])
    equal: dict[str, bool] = {}
    for mode in ("PIECEWISE", "FULL"):  # a whole recording is preferred, once there is one
        try:
            compiled.record(inputs, recorded_as=mode)
            before = counters.snapshot().get(f"replays:{mode}", 0)
            equal[mode] = bool(torch.equal(compiled(**inputs), expected))
            made = [one for one in compiled.explain().to_dict()["plan"]["sizes"]
                    if (one["num_tokens"], one["mode"]) == (count, mode)]  # fmt: skip
            found[mode] = {
                **figures(lambda: compiled(**inputs)),
                "replays": counters.snapshot().get(f"replays:{mode}", 0) - before,
                "capture_s": sum(one["seconds"] for one in made),
                "capture_bytes": sum(one["bytes"] for one in made),
                "unrecorded_pieces": sum(len(one["unrecorded"]) for one in made),
            }
        except Exception as error:  # noqa: BLE001 - whatever ends one way, the others are still measured
            found[mode] = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
    return {"equals_compiled": equal, "engines": found}


def measure_generation(shape: str, options: argparse.Namespace, budget: Budget) -> Iterator[dict[str, Any]]:
    """Tokens/s of each engine, again and again, with more each time."""
    found: dict[str, Any] = {"prompt": PROMPT_LEN, "output": options.output_len, "engines": {}, "left_out": []}
    with tempfile.TemporaryDirectory(prefix="onegraph-bench-model-") as name:
        folder, cache = Path(name) / "model", Path(name) / "cache"
        for engine in ("prepare", *options.engines):
            if budget.left() < GENERATION_S[engine]:
                found["left_out"].append(f"{engine}: no time")
                continue
            if engine != "prepare" and not folder.exists():
                found["left_out"].append(f"{engine}: no model was written")
                continue
            file = Path(name) / f"{engine}.jsonl"
            counts = [count for count in options.counts if count in COUNTS.get(engine, options.counts)]
            words = [engine, str(folder), options.device, shape if engine == "prepare" else json.dumps(counts),
                     str(PROMPT_LEN), str(options.output_len), str(file)]  # fmt: skip
            command = [sys.executable, "-m", "bench.cuda_generation", *words]
            code, _, errors = run_in_own_group(command, variables(engine, cache, None), min(MOST_S, budget.left()))
            lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            if engine != "prepare":
                found["engines"][engine] = generation_facts(lines)
            if code != 0:
                why = "ended by its time" if code is None else f"exit code {code}: {errors.strip()[-500:]}"
                found["left_out"].append(f"{engine}: {why}")
            yield found
    yield found


def generation_facts(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of an engine's lines: tokens/s by the number of requests, and what a step costs outside of the model."""
    found: dict[str, Any] = {
        "tokens_per_s": {str(one["requests"]): round(one["tokens_per_s"], 1) for one in lines if "requests" in one}
    }
    for one in lines:
        if "overhead" in one:
            found["step_overhead"] = one["overhead"]
    return found


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The figures as they go into the file, again and again, with more each time."""
    budget = Budget(options.budget_s)
    bandwidth = copy_bandwidth(options.device, options.copy_bytes)
    facts: dict[str, Any] = {
        "environment": {**environment(), **(gpu() if options.device == "cuda" else {})},
        "dtype": options.dtype,
        "context": options.context,
        "copy_bytes_per_s": round(bandwidth),
        "shapes": {},
        "generation": {},
    }
    for shape in options.shapes:
        if budget.left() < 30:
            facts["shapes"][shape] = {"left_out": ["no time"]}
            continue
        try:
            for found in measure_shape(shape, options, budget, bandwidth):
                facts["shapes"][shape] = found
                yield facts
        except Exception as error:  # noqa: BLE001 - one shape that fails doesn't take the others with it
            facts["shapes"].setdefault(shape, {})["failed"] = f"{type(error).__name__}: {str(error)[:1000]}"
            yield facts
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    for shape in options.shapes if options.engines else ():
        for found in measure_generation(shape, options, budget):
            facts["generation"][shape] = found
            yield facts
    yield facts


def one_cache(root: Path) -> Any:
    """onegraph's compile cache in a folder, inside."""
    return mock.patch.dict(os.environ, {"ONEGRAPH_CACHE_ROOT": str(root / "root")})


def table(facts: dict[str, Any]) -> str:
    """For people: milliseconds of a step, how much of the bandwidth's limit that is, and tokens/s."""
    rows = []
    for shape, found in facts["shapes"].items():
        rows.append(f"{shape}: median ms of a step (share of the limit)")
        for count, one in sorted(found.get("steps", {}).items(), key=lambda item: int(item[0])):
            cells = [
                f"{name}: {ways['median']:.3f} ({ways['fraction_of_limit']:.0%})"
                if "median" in ways
                else f"{name}: failed"
                for name, ways in one["engines"].items()
            ]
            rows.append(f"{count:>8} requests, limit {one['limit_ms']:.3f}  " + "; ".join(cells))
        rows += [f"  left out: {what}" for what in found.get("left_out", ())]
        rows += [f"  failed: {found['failed']}"] if "failed" in found else []
    for shape, found in facts["generation"].items():
        rows.append(f"{shape}: tokens/s, {found['prompt']} tokens in, {found['output']} out")
        for engine, one in found["engines"].items():
            rows.append(f"  {engine}: " + ", ".join(f"{n} requests {v}" for n, v in one["tokens_per_s"].items()))
        rows += [f"  left out: {what}" for what in found["left_out"]]
    return "\n".join(rows)


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.cuda", description=__doc__.splitlines()[0])
    made.add_argument("--shapes", default="llama-1b,llama-8b", type=lambda text: text.split(","))
    made.add_argument("--requests", dest="counts", default="1,8,64,256", type=numbers)
    made.add_argument("--context", type=int, default=1024)
    made.add_argument("--repeats", type=int, default=30)
    made.add_argument("--budget-s", type=float, default=470)
    made.add_argument("--engines", default=",".join(ENGINES), type=lambda text: text.split(",") if text else [],
                      help="that generate; none for an empty text")  # fmt: skip
    made.add_argument("--output-len", type=int, default=OUTPUT_LEN)
    made.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try the benchmark itself")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--backend", default="inductor", help="of onegraph.compile")
    made.add_argument("--copy-bytes", type=int, default=2**32, help="of the copy that measures the bandwidth")
    made.add_argument("--name", default="")
    made.add_argument("--out", type=Path, default=None)
    return made


def main(words: list[str] | None = None) -> int:
    """Measures, writes bench/results/DATE-cuda[-NAME].json as it goes, prints a table."""
    asked = parser()
    options = asked.parse_args(words)
    if unknown := [one for one in options.shapes if one not in SHAPES]:
        asked.error(f"there is no shape {unknown[0]}: {', '.join(SHAPES)}")
    stem = "-".join(part for part in (date.today().isoformat(), "cuda", options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        asked.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    facts: dict[str, Any] = {}
    with torch.inference_mode():
        for facts in measure(options):
            out.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(facts))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
