"""What runs in one step: the milliseconds of each kernel, of Python between them, and of the engine around them.

usage: python -m bench.step_profile [--shape 135m] [--requests 1 8 64] [--name NAME] [--svg FILE]

Takes the step profile that `onegraph bench --profile` prints (docs/profile.md), without recordings: of decode steps of
so many requests (128 tokens in), and of the prefill steps of the most. Adds the machine's limits, measured in the same
run: the time in which a core pair could read the weights and the KV cache once, and that of the multiplications at the
speed of PyTorch's own large ones.
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
from bench.models import SHAPES, make_model
from bench.step_overhead import PROMPT_LEN
from onegraph import LLM
from onegraph.cli.bench import Rounds

NUM_STEPS = 48


def limits() -> dict[str, float]:
    """What two cores read from memory (GB/s) and multiply (GFLOP/s, in bf16 or fp32, whichever is faster).

    The best of some runs. A CPU without instructions for bf16 multiplies it tens of times as slowly.
    """
    some = torch.ones(100_000_000)

    def best(function: Callable[[], Any], runs: int = 7) -> float:
        times = []
        for _ in range(runs):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
        return min(times)

    def multiplied(dtype: torch.dtype) -> float:
        a, b = torch.ones(2048, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
        return 2 * 2048**3 / best(lambda: a @ b, 3) / 1e9

    return {
        "read_gb_per_s": round(some.nbytes / best(lambda: some.sum()) / 1e9, 2),
        "gflop_per_s": round(max(map(multiplied, (torch.float32, torch.bfloat16))), 1),
    }


GROUPS = (
    ("linear layers", ("onegraph::linear", "extern_kernels.mm", "extern_kernels.addmm")),
    ("attention", ("onegraph::paged_attention",)),
    ("cache write, rotary", ("onegraph::write_kv", "onegraph::rotary")),
    ("fused kernels", ("cpp_fused", "triton")),
)
COLOURS = ("#3b6fb6", "#c8553d", "#e0a458", "#6a994e", "#8e7cc3", "#999999", "#4f9d9d", "#b5838d")


def grouped(profile: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by group of kernels, then Python, sampling and the engine; they add up to the step."""
    ms = {tuple(row["path"]): 1000 * row["seconds_per_step"] for row in profile["rows"]}
    kernels = {path: one for path, one in ms.items() if path[:2] == ("step", "model") and len(path) == 4}
    found = {name: sum(one for path, one in kernels.items() if path[-1].startswith(begins)) for name, begins in GROUPS}
    found["Python in the model"] = ms["step", "model"] - sum(kernels.values())
    found["sampling"] = ms.get(("step", "sampling"), 0.0)
    found["input preparation"] = ms.get(("step", "input preparation"), 0.0)
    found["scheduler, outputs"] = ms["step",] - ms["step", "model"] - found["sampling"] - found["input preparation"]
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
    """The profile of each batch's steps, and the limits."""
    batches: dict[str, Any] = {}
    llm = LLM(
        str(make_model(shape, folder)),
        max_model_len=1024,
        enable_prefix_caching=False,
        compilation_config={"cudagraph_mode": "NONE"},
    )
    for num_requests in requests:
        Rounds(llm, num_requests, PROMPT_LEN, 6).profiled()
        found = Rounds(llm, num_requests, PROMPT_LEN, NUM_STEPS).profiled()
        batches[f"decode {num_requests}"] = found["decode"].to_dict()
        if num_requests == max(requests):
            batches["prefill"] = found["prefill"].to_dict()
        print(f"decode {num_requests}: {found['decode'].num_steps} steps", file=sys.stderr, flush=True)
    model, speeds = llm._started.model, limits()
    kv_bytes = 2 * model.kv.num_layers * model.kv.num_kv_heads * model.kv.head_dim * model.kv.dtype.itemsize
    for num_requests in requests:
        context = PROMPT_LEN + NUM_STEPS // 2
        num_bytes = model.weight_bytes + num_requests * context * kv_bytes
        flops = 2 * num_requests * model.num_parameters
        batches[f"decode {num_requests}"]["limits_ms"] = {
            "reading": round(num_bytes / speeds["read_gb_per_s"] / 1e6, 3),
            "multiplying": round(flops / speeds["gflop_per_s"] / 1e6, 3),
        }
    return {"limits": speeds, "weight_bytes": model.weight_bytes, "batches": batches}


def kept(result: dict[str, Any]) -> dict[str, Any]:
    """What is written: the groups' milliseconds in the place of the profiles' hundreds of rows."""
    batches = {
        name: {**{key: one for key, one in part.items() if key != "rows"}, "groups_ms": grouped(part)}
        for name, part in result["batches"].items()
    }
    return {**result, "batches": batches}


def table(result: dict[str, Any]) -> str:
    """Milliseconds and share of the step, by group."""
    rows = {name: grouped(part) for name, part in result["batches"].items()}
    lines = [f"{'ms':<24}" + "".join(f"{name:>20}" for name in rows)]
    for part in next(iter(rows.values())):
        cells = (f"{found[part]:>12.3f}{found[part] / sum(found.values()):>7.1%} " for found in rows.values())
        lines.append(f"{part:<24}{''.join(cells)}")
    lines.append(f"{'step':<24}" + "".join(f"{sum(found.values()):>12.3f}{'':8}" for found in rows.values()))
    for limit in ("reading", "multiplying"):
        cells = (part.get("limits_ms", {}).get(limit) for part in result["batches"].values())
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
    out.with_suffix(".json").write_text(json.dumps(kept(result), indent=1) + "\n")
    if options.svg:
        options.svg.write_text(picture(f"One step, {options.shape} shape in bf16, 2 cores", result["batches"]))
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
