"""Decoding steps of a 1B Llama on a GPU: eager, compiled, and compiled as one CUDA graph, against the memory's limit.

usage: python -m bench.cuda [--shape llama-1b] [--requests 1,8,64,256] [--context 1024] [--name NAME]

One step is one call of the model on inputs that lie on the device, from the call to the end of its work there, as an
engine waits for it. The graph is recorded here, by hand: onegraph makes no recordings yet, and this is the bound that
they can reach. The limit is the time in which the measured copy bandwidth moves the bytes of the weights and of the
requests' keys and values once. Takes a minute.
"""

from __future__ import annotations

import argparse
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
from bench.figures import summary
from bench.models import SHAPES, make_config

BLOCK_SIZE = 16
MAX_TOKENS, MAX_REQUESTS = 2048, 256


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


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a copy of 4 GiB on the device, the best of ten."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), 10))


def timed(step: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call, from its beginning to the end of its work on the device; three calls go before."""
    seconds = []
    for i in range(repeats + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if i >= 3:
            seconds.append(time.perf_counter() - began)
    return seconds


def make_flat_model(shape: str) -> Any:
    """The model as onegraph calls it, with random weights, on the device."""
    from transformers import AutoModelForCausalLM

    from onegraph.models.attention import ATTENTION, register
    from onegraph.models.flat_model import FlatModel

    register()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            make_config(shape), dtype=torch.bfloat16, attn_implementation=ATTENTION
        )
    return FlatModel(model.eval().requires_grad_(False))


def decode_inputs(num_requests: int, context: int, caches: Any) -> dict[str, Any]:
    """One new token for each request, whose context with it has `context` tokens, in shuffled blocks."""
    blocks_each = -(-context // BLOCK_SIZE)
    tables = torch.randperm(num_requests * blocks_each, device="cuda").int().view(num_requests, blocks_each)
    positions = torch.full((num_requests,), context - 1, device="cuda")
    slots = tables[:, -1].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
    return {
        "input_ids": torch.arange(1, num_requests + 1, device="cuda"),
        "positions": positions,
        "slot_mapping": slots,
        "query_start_loc": torch.arange(num_requests + 1, device="cuda", dtype=torch.int32),
        "seq_lens": torch.full((num_requests,), context, device="cuda", dtype=torch.int32),
        "block_tables": tables.contiguous(),
        "logits_indices": torch.arange(num_requests, device="cuda"),
        "kv_caches": caches,
    }


def compiled_model(flat: Any, name: str, example: dict[str, Any], max_blocks: int) -> tuple[Any, dict[str, Any]]:
    """The compiled model, and the seconds of its stages."""
    import onegraph

    compiled = onegraph.compile(
        flat,
        dynamic_shapes=flat.dynamic_shapes(MAX_TOKENS, MAX_REQUESTS, max_blocks, len(example["kv_caches"])),
        own_module=True,
        name=name,
    )
    began = time.perf_counter()
    compiled(**example)
    torch.cuda.synchronize()
    explained = compiled.explain()
    return compiled, {
        "start": explained.start,
        "seconds": round(time.perf_counter() - began, 3),
        "stages": {stage: round(took, 3) for stage, took in explained.stages},
    }


def recorded(step: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """The step as one CUDA graph, and its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph.replay, out


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-1b", choices=sorted(SHAPES))
    parser.add_argument("--requests", default="1,8,64,256")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--name", default="")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    stem = "-".join(part for part in (date.today().isoformat(), "cuda", options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        parser.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    facts: dict[str, Any] = {}
    with torch.inference_mode():
        for facts in measure(options):
            out.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(facts))
    print(f"written: {out}")
    return 0


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The figures as they go into the file, again and again, with more each time."""
    from onegraph.op_kernels import install_op_kernels
    from onegraph.store.store import Store
    from onegraph.targets import target_for

    counts = [int(count) for count in options.requests.split(",")]
    bandwidth = copy_bandwidth()
    with torch.inference_mode(False):
        flat = make_flat_model(options.shape)
    config = flat.model.config
    weight_bytes = sum(p.nbytes for p in flat.parameters())
    max_blocks = -(-options.context // BLOCK_SIZE)
    shape = (max(counts) * max_blocks, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
    caches = [
        tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for _ in range(config.num_hidden_layers)
    ]
    token_bytes = sum(2 * k[0, 0].nbytes for k, _ in caches)
    facts: dict[str, Any] = {
        "environment": {**environment(), **gpu()},
        "shape": options.shape,
        "dtype": "bfloat16",
        "context": options.context,
        "weight_bytes": weight_bytes,
        "copy_bytes_per_s": round(bandwidth),
        "compile": {},
        "steps_ms": {},
    }
    target = target_for("cuda")
    with tempfile.TemporaryDirectory(prefix="onegraph-bench-cache-") as root:
        install_op_kernels(target, None)
        example = decode_inputs(2, options.context, caches)
        flat(**example)  # has Triton compile the attention kernels
        with one_cache(Path(root)):
            _, facts["compile"]["cold"] = compiled_model(flat, "cold", example, max_blocks)
            compiled, facts["compile"]["warm"] = compiled_model(flat, "warm", example, max_blocks)
        facts["compile"]["store_bytes"] = Store(Path(root) / "root").size_bytes()
    for count in counts:
        inputs = decode_inputs(count, options.context, caches)
        moved = weight_bytes + count * options.context * token_bytes
        limit_ms = 1000 * moved / bandwidth
        replay, output = recorded(lambda inputs=inputs: compiled(**inputs))  # type: ignore[misc]
        replay()
        replayed = output.clone()
        steps = {
            "eager": lambda inputs=inputs: flat(**inputs),
            "compiled": lambda inputs=inputs: compiled(**inputs),
            "compiled, one CUDA graph": replay,
        }
        figures = {
            name: summary([1000 * s for s in timed(step, options.repeats)])  # type: ignore[arg-type]
            for name, step in steps.items()
        }
        facts["steps_ms"][str(count)] = {
            "bytes": moved,
            "limit_ms": round(limit_ms, 4),
            "replay_is_bitwise_equal": bool(torch.equal(replayed, compiled(**inputs))),
            "engines": {
                name: {**found, "fraction_of_limit": round(limit_ms / found["median"], 3)}
                for name, found in figures.items()
            },
        }
        print(f"{count} requests: limit {limit_ms:.3f} ms, " + json.dumps({k: v["median"] for k, v in figures.items()}),
              file=sys.stderr, flush=True)  # fmt: skip
        yield facts


def one_cache(root: Path) -> Any:
    """onegraph's compile cache in a folder, inside."""
    return mock.patch.dict(os.environ, {"ONEGRAPH_CACHE_ROOT": str(root / "root")})


def table(facts: dict[str, Any]) -> str:
    """For people: median milliseconds of a step, and how much of the bandwidth's limit that is."""
    rows = [f"{'requests':>8} {'limit ms':>9}  engine: median ms (fraction of the limit)"]
    for count, one in facts["steps_ms"].items():
        cells = [
            f"{name}: {found['median']:.3f} ({found.get('fraction_of_limit', 0):.0%})"
            for name, found in one["engines"].items()
            if "median" in found
        ]
        rows.append(f"{count:>8} {one.get('limit_ms', 0):>9.3f}  " + "; ".join(cells))
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
