"""Tables of a result: medians and ratios in Markdown for the documentation, and with spread for a terminal.

usage: python -m bench.table RESULT.json [--spread]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FIGURES = {
    "seconds": ("", "s"),
    "tokens_per_s": ("", "tokens/s"),
    "ready_s": ("time to ready", "s"),
    "output_tokens_per_s": ("", "tokens/s"),
    "ttft_p50_ms": ("first token, median", "ms"),
    "ttft_p95_ms": ("first token, p95", "ms"),
    "tpot_p50_ms": ("time per token, median", "ms"),
}
"""Key: (what it is beside the workload's name, unit)."""


class Row(NamedTuple):
    """One figure of all engines: its name with the unit, and for each engine its entry and its ratio."""

    name: str
    entries: dict[str, tuple[dict[str, Any] | None, float | None, str]]
    """Engine: (summary or None, ratio to the first or None, why it failed)."""


def rows(facts: dict[str, Any]) -> Iterator[Row]:
    """The figures of a result in the order in which they were measured."""
    for name, workload in facts["workloads"].items():
        engines: dict[str, Any] = workload["engines"]
        title = name.replace("_", " ")
        if not any("levels" in found for found in engines.values()):
            first_token = workload["workload"]["measure"] == "first_token"
            yield _row(title, "seconds" if first_token else "tokens_per_s", engines)
            continue
        yield _row(title, "ready_s", engines)
        for level in map(str, workload["workload"]["concurrency"]):
            of_level = {engine: found["levels"].get(level, {}) for engine, found in engines.items()}
            reasons = {engine: (found["failed"] or [""])[0] for engine, found in engines.items()}
            for key in ("output_tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms"):
                yield _row(f"{title}, {level} concurrent", key, of_level, reasons)


def _row(title: str, key: str, engines: dict[str, Any], reasons: dict[str, str] | None = None) -> Row:
    what, unit = FIGURES[key]
    entries = {}
    for engine, found in engines.items():
        ratio = found.get("ratio")
        failed = (found.get("failed") or [""])[0] or (reasons or {}).get(engine, "")
        entries[engine] = (found.get(key), ratio.get(key) if isinstance(ratio, dict) else ratio, failed)
    return Row(f"{title}{': ' if what else ''}{what}, {unit}", entries)


def number(value: float) -> str:
    """Three digits that matter, none of them after the point from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def markdown_table(facts: dict[str, Any]) -> str:
    """A row for each figure, a column for each engine: median, and in brackets the ratio to the first engine."""
    found = list(rows(facts))
    engines = list(dict.fromkeys(engine for row in found for engine in row.entries))
    lines = [f"| | {' | '.join(engines)} |", "|---|" + "---:|" * len(engines)]
    for row in found:
        cells = []
        for engine in engines:
            summary, ratio, failed = row.entries.get(engine, (None, None, ""))
            if summary is None:
                cells.append("failed" if failed else "–")
            elif engine == engines[0] or ratio is None:
                cells.append(number(summary["median"]))
            else:
                cells.append(f"{number(summary['median'])} ({ratio:.2f})")
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def text_table(facts: dict[str, Any]) -> str:
    """A line for each figure and engine, with the spread; ratio above 1: the first engine is better."""
    lines = [f"{'figure':<52} {'engine':<22} {'median':>8} {'min..max':>20} {'ratio':>6}"]
    for row in rows(facts):
        for engine, (summary, ratio, failed) in row.entries.items():
            if summary is None:
                lines.append(f"{row.name:<52} {engine:<22} {'failed':>8} {failed[:60]}")
                continue
            spread = f"{number(summary['min'])}..{number(summary['max'])}"
            told = "" if ratio is None else f"{ratio:.2f}"
            lines.append(f"{row.name:<52} {engine:<22} {number(summary['median']):>8} {spread:>20} {told:>6}")
    return "\n".join(lines)


def main() -> int:
    """Prints the table of one result."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--spread", action="store_true", help="a line for each engine, with min and max")
    options = parser.parse_args()
    facts = json.loads(options.result.read_text())
    print(text_table(facts) if options.spread else markdown_table(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
