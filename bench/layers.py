"""How a start grows with the number of layers: seconds from process start to first token, split and in one piece.

usage: python -m bench.layers [--shape 135m] [--layers 12,30,60] [--unsplit 12,30] [--repeats 2] [--name NAME]

Each measurement is a process of its own; a cold start has an empty compile cache, the warm one after it has what the
cold one left. Repeats go through all of them in turns, so that other load meets them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from bench.__main__ import RESULTS, environment
from bench.figures import summary
from bench.models import SHAPES, make_model

KEPT = ("seconds", "cpu_seconds", "ready", "index", "capture", "compile or load")
"""`ready` is from loaded weights to an engine that can serve."""


def measure_once(folder: str, split: bool, began: float) -> dict[str, Any]:
    """One start, in this process: seconds since `began`, CPU seconds, seconds of its stages, number of artifacts."""
    import onegraph

    config = {} if split else {"splitting_ops": []}
    llm = onegraph.LLM(
        folder, num_kv_blocks=64, max_num_batched_tokens=256, max_num_seqs=16, max_model_len=512,
        compilation_config=config,
    )  # fmt: skip
    greedy = onegraph.SamplingParams(temperature=0, max_tokens=1)
    llm.generate({"prompt_token_ids": list(range(100, 116))}, greedy, use_tqdm=False)
    seconds = time.time() - began
    explained = llm.explain()
    distinct = [piece for piece in explained.pieces if piece.kind == "compiled" and piece.same_as is None]
    return {
        "seconds": seconds,
        "cpu_seconds": sum(os.times()[:4]),  # with those of the C++ compiler
        "start": explained.start,
        "artifacts": len(distinct),
        "ready": llm._started.compile_s,
        **dict.fromkeys(KEPT[KEPT.index("capture") :], 0.0),  # nothing of it where the index has the build
        **{name: took for name, took in explained.stages if name in KEPT},
    }


def main() -> int:
    """Runs the repeats, writes bench/results/DATE-layers[-NAME].json, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.layers", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="135m", choices=list(SHAPES))
    parser.add_argument("--layers", default="12,30,60")
    parser.add_argument("--unsplit", default="12,30", help="numbers of layers that are compiled in one piece, too")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--name", default="", help="ends the file's name, where a day has several runs")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--once", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once is not None:
        folder, kind, began = options.once
        print(json.dumps(measure_once(folder, kind == "split", float(began))))
        return 0
    stem = "-".join(part for part in (date.today().isoformat(), "layers", options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        parser.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    variants = [(int(n), "split") for n in options.layers.split(",")]
    variants += [(int(n), "unsplit") for n in options.unsplit.split(",") if n]
    facts: dict[str, Any] = {"environment": environment(), "shape": options.shape, "starts": {}}
    with tempfile.TemporaryDirectory(prefix="onegraph-bench-") as work:
        for count in {n for n, _ in variants}:
            make_model(options.shape, Path(work) / f"{count}", num_layers=count)
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(options.repeats):
            for count, kind in variants:
                with tempfile.TemporaryDirectory(prefix="onegraph-bench-cache-") as cache:
                    for start in ("cold", "warm"):
                        result = _start(f"{work}/{count}", kind, cache)
                        assert result["start"] == start, result
                        found.setdefault(f"{count} layers, {kind}, {start}", []).append(result)
                        print(f"{count} {kind} {start}: {result['seconds']:.1f} s", file=sys.stderr, flush=True)
    for title, results in found.items():
        facts["starts"][title] = {
            "artifacts": results[0]["artifacts"],
            **{name: summary([one[name] for one in results]) for name in KEPT},
        }
    out.write_text(json.dumps(facts, indent=1) + "\n")
    titles = ("start to token", "CPU", *KEPT[2:], "artifacts")
    print(f"{'median s':<28}" + "".join(f"{one:>17}" for one in titles))
    for title, one in facts["starts"].items():
        cells = [one[name]["median"] for name in KEPT]
        print(f"{title:<28}" + "".join(f"{cell:>17.2f}" for cell in cells) + f"{one['artifacts']:>17}")
    print(f"written: {out}")
    return 0


def _start(folder: str, kind: str, cache: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "bench.layers", "--once", folder, kind, str(time.time())]
    variables = {**os.environ, "ONEGRAPH_CACHE_ROOT": f"{cache}/root", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
    result = subprocess.run(words, capture_output=True, text=True, timeout=900, check=True, env=variables)
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    sys.exit(main())
