"""Seconds of capture, without any compiler: Dynamo's trace, the ledger, the contract; for real shapes, as JSON.

usage: python -m bench.capture_time [--shapes 135m,qwen3-0.6b] [--repeats 3] [--name NAME] [--out FILE]

Each measurement is a process of its own with random weights; the first capture of a process also imports and warms
up torch's tracing, so a second capture of the same model is timed, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from bench.__main__ import RESULTS, environment
from bench.models import SHAPES, make_model


def measure_once(folder: str) -> dict[str, Any]:
    """One process: the stage's seconds of the first and of the second capture, and what was captured."""
    import onegraph

    seconds = []
    facts: dict[str, Any] = {}
    for _ in range(2):
        llm = onegraph.LLM(
            folder, dtype="bfloat16", num_kv_blocks=64, max_num_batched_tokens=256, max_num_seqs=16,
            max_model_len=512, compilation_config={"backend": "eager"},
        )  # fmt: skip
        explained = llm.explain()
        seconds.append(dict(explained.stages)["capture"])
        facts = {"ops": explained.num_ops, "state_reads": len(explained.ledger.state)}
    return {"first_s": round(seconds[0], 3), "second_s": round(seconds[1], 3), **facts}


def main() -> int:
    """Runs the repeats, writes bench/results/DATE-capture-time[-NAME].json, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.capture_time", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="135m,qwen3-0.6b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="", help="ends the file's name, where a day has several runs")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--once", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once is not None:
        print(json.dumps(measure_once(options.once)))
        return 0
    stem = "-".join(part for part in (date.today().isoformat(), "capture-time", options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        parser.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    facts: dict[str, Any] = {"environment": environment(), "shapes": {}}
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory(prefix="onegraph-bench-") as folder:
            make_model(shape, Path(folder))
            repeats = []
            for _ in range(options.repeats):
                words = [sys.executable, "-m", "bench.capture_time", "--once", folder]
                uncached = {**os.environ, "ONEGRAPH_DISABLE_COMPILE_CACHE": "1"}  # else the index has the second one
                result = subprocess.run(words, capture_output=True, text=True, timeout=900, check=True, env=uncached)
                repeats.append(json.loads(result.stdout.splitlines()[-1]))
        facts["shapes"][shape] = entry = {
            "ops": repeats[0]["ops"],
            "state_reads": repeats[0]["state_reads"],
            **{
                when: {
                    "median": statistics.median(one[when] for one in repeats),
                    "all": [one[when] for one in repeats],
                }
                for when in ("first_s", "second_s")
            },
        }
        print(f"{shape}: {entry['ops']} operations, {entry['state_reads']} reads of state; capture "
              f"{entry['first_s']['median']:.2f} s, again {entry['second_s']['median']:.2f} s")  # fmt: skip
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
