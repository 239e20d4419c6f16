"""What runs in one step: the milliseconds of each kernel, of Python between them, and of the engine around them.

usage: python -m bench.step_profile [--shape 135m] [--requests 1 8 64] [--name NAME] [--svg FILE]

Wraps the kernels' Python functions and the engine's methods from outside: a decode step of so many requests (128 tokens
in), and a prefill step of as many prompts as the budget takes. States the machine's limits, measured in the same run:
the time in which a core pair could read the weights and the KV cache once, and that of the multiplications at the speed
of PyTorch's own large ones. Timers take about 0.3 microseconds a call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.__main__ import RESULTS, environment
from bench.figures import summary
from bench.models import SHAPES, make_model
from bench.step_overhead import PROMPT_LEN, wrap_engine
from onegraph import LLM, SamplingParams
from onegraph.api import open_store
from onegraph.compilers import loading
from onegraph.op_kernels import install_op_kernels
from onegraph.ops import library
from onegraph.targets import target_for
from onegraph.targets.cpu.linear import Linear

NUM_STEPS = 48


class KernelClock:
    """Seconds and calls by label in the current step; as `bench.step_overhead.Clock`, for `wrap_engine`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def wrap(self, label: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is added to its label, which may depend on the arguments."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            seconds = time.perf_counter() - began
            name = label if isinstance(label, str) else label(*args)
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self.calls[name] = self.calls.get(name, 0) + 1
            return result

        return timed

    def clear(self) -> None:
        """Begins a step."""
        self.seconds.clear()
        self.calls.clear()


@contextmanager
def timed_kernels(clock: KernelClock) -> Iterator[None]:
    """Artifacts that are loaded inside, and onegraph's own ops, have their kernels timed."""
    install_op_kernels(target_for("cpu"), open_store())
    put_together, call_linear = loading.put_together, Linear.__call__
    own = dict(library._implemented)

    def put_together_timed(path: Any, source: str, kernels: Any, *rest: Any) -> dict[str, Any]:
        namespace = put_together(path, source, kernels, *rest)
        known = set(map(id, kernels.values()))
        for name, value in list(namespace.items()):
            if id(value) in known:
                namespace[name] = clock.wrap(f"fused {name.removeprefix('cpp_fused_')}", value)
        return namespace

    loading.put_together = put_together_timed  # type: ignore[assignment]
    Linear.__call__ = clock.wrap(  # type: ignore[method-assign]
        lambda op, x, weight, *rest: f"linear {weight.shape[1]} to {weight.shape[0]}", call_linear
    )
    for key, function in own.items():
        if key[0] != "linear":
            library._implemented[key] = clock.wrap(key[0], function)
    try:
        yield
    finally:
        loading.put_together, Linear.__call__ = put_together, call_linear  # type: ignore[assignment,method-assign]
        library._implemented.update(own)


def steps(llm: LLM, clock: KernelClock, num_requests: int, num_tokens: int) -> tuple[list[Any], list[Any]]:
    """The times of full prefill steps and of steps in which all requests decode: (seconds, calls) for each."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for number in range(num_requests):
        prompt = [(number * 131 + i * 7) % 1000 + 1 for i in range(PROMPT_LEN)]
        llm.engine.add_request(f"{number}", prompt, params)
    prefills, decodes, generated, before_all = [], [], llm.engine.stats.num_generated_tokens, True
    while llm.engine.has_unfinished():
        clock.clear()
        outputs = llm.engine.step()
        found = dict(clock.seconds), dict(clock.calls)
        new, generated = llm.engine.stats.num_generated_tokens - generated, llm.engine.stats.num_generated_tokens
        if new == num_requests and not any(one.finished for one in outputs):
            if not before_all:
                decodes.append(found)
            before_all = False
        elif not decodes:
            prefills.append(found)
    return prefills, decodes


ENGINE = ("step", "schedule", "run", "model", "sample", "postprocess", "outputs", "detokenise")


def split(found: list[Any]) -> dict[str, Any]:
    """Median milliseconds and calls of each part; the parts add up to the step."""
    labels = dict.fromkeys(label for seconds, _ in found for label in seconds if label not in ENGINE)

    def rows(parts: Callable[[dict[str, float]], float]) -> dict[str, Any]:
        return summary([1000 * parts(seconds) for seconds, _ in found])

    def get(name: str) -> Callable[[dict[str, float]], float]:
        return lambda seconds: seconds.get(name, 0.0)

    kernels = {
        label: {"ms": rows(get(label)), "calls": statistics.median(calls.get(label, 0) for _, calls in found)}
        for label in labels
    }
    return {
        "step": rows(get("step")),
        "model": rows(get("model")),
        "kernels": kernels,
        "python_in_the_model": rows(lambda s: s["model"] - sum(s.get(label, 0.0) for label in labels)),
        "input_preparation": rows(lambda s: s["run"] - s["model"]),
        "sampling": rows(get("sample")),
        "scheduler_and_outputs": rows(lambda s: s["step"] - s["run"] - s["sample"]),
    }


def limits() -> dict[str, float]:
    """What two cores read from memory (GB/s) and multiply in bf16 (GFLOP/s), the best of some runs."""
    some = torch.ones(100_000_000)
    a, b = torch.ones(4096, 2048, dtype=torch.bfloat16), torch.ones(2048, 4096, dtype=torch.bfloat16)

    def best(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
        return min(times)

    return {
        "read_gb_per_s": round(some.nbytes / best(lambda: some.sum()) / 1e9, 2),
        "bf16_gflop_per_s": round(2 * 4096 * 4096 * 2048 / best(lambda: a @ b) / 1e9, 1),
    }


GROUPS = (
    ("linear layers", lambda label: label.startswith("linear")),
    ("attention", lambda label: label == "paged_attention"),
    ("cache write, rotary", lambda label: label.startswith(("write_kv", "rotary"))),
    ("fused kernels", lambda label: label.startswith("fused")),
)
COLOURS = ("#3b6fb6", "#c8553d", "#e0a458", "#6a994e", "#8e7cc3", "#999999", "#4f9d9d", "#b5838d")


def grouped(part: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by group of kernels, then Python, sampling and the engine."""
    kernels = part["kernels"]
    found = {name: sum(one["ms"]["median"] for label, one in kernels.items() if fits(label)) for name, fits in GROUPS}
    found["Python in the model"] = part["python_in_the_model"]["median"]
    found["sampling"] = part["sampling"]["median"]
    found["input preparation"] = part["input_preparation"]["median"]
    found["scheduler, outputs"] = part["scheduler_and_outputs"]["median"]
    return found


def picture(title: str, batches: dict[str, dict[str, Any]]) -> str:
    """An SVG with a bar for each batch, divided by group; each bar has its own scale, which its label tells."""
    rows = {name: grouped(part) for name, part in batches.items()}
    names = list(next(iter(rows.values())))
    width, left, height = 720, 150, 34
    legend_top = 50 + height * len(rows)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + left + 20} {legend_top + 60}" '
        'font-family="sans-serif" font-size="13">',
        "<style>text{fill:#222}@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>",
        f'<text x="4" y="20" font-size="15">{title}</text>',
    ]
    for row, (name, parts) in enumerate(rows.items()):
        total, x, y = sum(parts.values()), float(left), 36 + height * row
        lines.append(f'<text x="4" y="{y + 16}">{name}: {total:.1f} ms</text>')
        for colour, (part, ms) in zip(COLOURS, parts.items(), strict=True):
            length = width * ms / total
            lines.append(f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="22" fill="{colour}">'
                         f"<title>{part}: {ms:.2f} ms, {ms / total:.0%}</title></rect>")  # fmt: skip
            if length > 34:
                lines.append(f'<text x="{x + 4:.1f}" y="{y + 16}" style="fill:#fff">{ms / total:.0%}</text>')
            x += length
    for number, (colour, name) in enumerate(zip(COLOURS, names, strict=True)):
        x, y = 4 + (number % 4) * 215, legend_top + 10 + 22 * (number // 4)
        lines.append(f'<rect x="{x}" y="{y - 11}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 18}" y="{y}">{name}</text>')
    return "\n".join([*lines, "</svg>", ""])


def measure(shape: str, requests: list[int], folder: Path) -> dict[str, Any]:
    """The parts of each batch's step, and the limits."""
    clock = KernelClock()
    batches: dict[str, Any] = {}
    with timed_kernels(clock):
        llm = LLM(str(make_model(shape, folder)), max_model_len=1024, enable_prefix_caching=False)
        wrap_engine(llm.engine, clock)  # type: ignore[arg-type]
        for num_requests in requests:
            steps(llm, clock, num_requests, 6)
            prefills, decodes = steps(llm, clock, num_requests, NUM_STEPS)
            batches[f"decode {num_requests}"] = split(decodes)
            if num_requests == max(requests) and prefills:
                batches["prefill"] = split(prefills)
            print(f"decode {num_requests}: {len(decodes)} steps", file=sys.stderr, flush=True)
    model, speeds = llm._started.model, limits()
    kv_bytes = 2 * model.kv.num_layers * model.kv.num_kv_heads * model.kv.head_dim * model.kv.dtype.itemsize
    for num_requests in requests:
        context = PROMPT_LEN + NUM_STEPS // 2
        num_bytes = model.weight_bytes + num_requests * context * kv_bytes
        flops = 2 * num_requests * model.num_parameters
        batches[f"decode {num_requests}"]["limits_ms"] = {
            "reading": round(num_bytes / speeds["read_gb_per_s"] / 1e6, 3),
            "multiplying": round(flops / speeds["bf16_gflop_per_s"] / 1e6, 3),
        }
    return {"limits": speeds, "weight_bytes": model.weight_bytes, "batches": batches}


def table(result: dict[str, Any]) -> str:
    """Milliseconds and share of the step, by group."""
    rows = {name: grouped(part) for name, part in result["batches"].items()}
    lines = [f"{'ms':<24}" + "".join(f"{name:>20}" for name in rows)]
    for part in next(iter(rows.values())):
        cells = (f"{found[part]:>12.3f}{found[part] / sum(found.values()):>7.1%} " for found in rows.values())
        lines.append(f"{part:<24}{''.join(cells)}")
    batches = result["batches"].values()
    lines.append(f"{'step':<24}" + "".join(f"{part['step']['median']:>12.3f}{'':8}" for part in batches))
    for limit in ("reading", "multiplying"):
        cells = (part.get("limits_ms", {}).get(limit) for part in batches)
        lines.append(f"{f'limit: {limit}':<24}" + "".join(f"{cell or '':>12}{'':8}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    """Measures, writes bench/results/DATE-step-profile[-NAME].json and the picture, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.step_profile", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="135m", choices=sorted(SHAPES))
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--name", default="", help="ends the file's name, where a day has several runs")
    parser.add_argument("--svg", type=Path, help="where the picture goes")
    options = parser.parse_args()
    facts = environment()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "environment": facts,
            "shape": options.shape,
            **measure(options.shape, options.requests, Path(folder)),
        }
    out = RESULTS / "-".join(filter(None, (f"{date.today()}", "step-profile", options.name)))
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    if options.svg:
        options.svg.write_text(picture(f"One step, {options.shape} shape in bf16, 2 cores", result["batches"]))
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
