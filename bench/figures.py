"""From single measurements to figures: medians, spread, and ratios to the first engine.

Takes: what the processes gave, one dict for each repeat. Gives: dicts that go into the results as they are; every
single value stays listed.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from bench.workloads import ServerWorkload, Workload

Run = dict[str, Any]

HIGHER_IS_BETTER = frozenset({"tokens_per_s", "output_tokens_per_s"})
SERVER_FIGURES = ("output_tokens_per_s", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms", "gap_p95_ms")


def summary(values: list[float]) -> dict[str, Any]:
    """Median and spread (min, max, distance of the quartiles) of the measurements, which stay listed."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": round(statistics.median(values), 4),
        "iqr": round(quartiles[2] - quartiles[0], 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "all": [round(value, 4) for value in values],
    }


def percentile(values: list[float], percent: float) -> float:
    """The value below which `percent` of them lie, linear between neighbours (numpy's default). Not for no values."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def figures(workload: Workload, runs: list[Run]) -> dict[str, Any]:
    """One engine's figures for a workload: seconds for starts, tokens/s and ms per token for generation."""
    good = [run for run in runs if "failed" not in run]
    found: dict[str, Any] = {
        "failed": [run["failed"] for run in runs if "failed" in run],
        "threads": sorted({run["threads"] for run in good if "threads" in run}),
        "dtype": sorted({run["dtype"] for run in good if "dtype" in run}),
        "load_average_before": [run["load_average_before"] for run in good if "load_average_before" in run],
    }
    if good and workload.measure == "first_token":
        found["seconds"] = summary([run["seconds"] for run in good])
    elif good:
        found["tokens_per_s"] = summary([run["tokens"] / run["seconds"] for run in good])
        found["ms_per_token"] = summary([1000 * run["seconds"] * workload.num_requests / run["tokens"] for run in good])
        found["peak_rss_mib"] = [run["peak_rss_mib"] for run in good if "peak_rss_mib" in run]
    return found


def server_figures(workload: ServerWorkload, runs: list[Run]) -> dict[str, Any]:
    """One engine's figures for the server: seconds to ready, and for each level tokens/s, first token and pace.

    A percentile is over the requests of one repeat; median and spread are over the repeats.
    """
    good = [run for run in runs if "failed" not in run]
    found: dict[str, Any] = {
        "failed": [run["failed"] for run in runs if "failed" in run],
        "load_average_before": [run["load_average_before"] for run in good if "load_average_before" in run],
        "levels": {},
    }
    if good:
        found["ready_s"] = summary([run["ready_s"] for run in good])
    for level in map(str, workload.concurrency):
        levels = [run["levels"][level] for run in good if level in run["levels"]]
        measured = [one for one in levels if "failed" not in one]
        entry: dict[str, Any] = {"failed": [one["failed"] for one in levels if "failed" in one]}
        if measured:
            entry |= {name: summary([one[name] for one in measured]) for name in SERVER_FIGURES if name in measured[0]}
            entry["requests"] = [one["requests"] for one in measured]
        found["levels"][level] = entry
    return found


def level_figures(answers: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """One repeat's figures of a level, from what the client saw of each request (times in ms) and the seconds of all.

    ttft: sending to first text. tpot: from there to the last token, for each token after the first. gap: between
    two events with text; servers may put several tokens into one.
    """
    ttft = [answer["ttft_ms"] for answer in answers]
    tpot = [answer["tpot_ms"] for answer in answers]
    gaps = [gap for answer in answers for gap in answer["gaps_ms"]]
    return {
        "output_tokens_per_s": sum(answer["tokens"] for answer in answers) / seconds,
        "ttft_p50_ms": percentile(ttft, 50),
        "ttft_p95_ms": percentile(ttft, 95),
        "tpot_p50_ms": percentile(tpot, 50),
        "gap_p95_ms": percentile(gaps or [0.0], 95),
        "requests": {
            "seconds": round(seconds, 4),
            "tokens": sum(answer["tokens"] for answer in answers),
            "events": sum(len(answer["gaps_ms"]) + 1 for answer in answers),
            "ttft_ms": [round(value, 2) for value in ttft],
            "tpot_ms": [round(value, 3) for value in tpot],
        },
    }


def ratio(baseline: dict[str, Any], found: dict[str, Any], key: str) -> float | None:
    """How many times better the baseline's median is (above 1: better), None where either has none."""
    if key not in baseline or key not in found or not baseline[key]["median"] or not found[key]["median"]:
        return None
    first, other = baseline[key]["median"], found[key]["median"]
    return round(first / other if key in HIGHER_IS_BETTER else other / first, 4)


def add_ratios(engines: dict[str, dict[str, Any]]) -> None:
    """Gives each engine its `ratio` to the first one (above 1: the first is better), None where either has failed.

    A server's engines get one at each level for each figure, and one for the time to ready.
    """
    baseline = next(iter(engines.values()))
    for found in engines.values():
        if "levels" not in found:
            key = "seconds" if "seconds" in baseline else "tokens_per_s"
            found["ratio"] = ratio(baseline, found, key)
            continue
        found["ratio"] = {"ready_s": ratio(baseline, found, "ready_s")}
        for level, entry in found["levels"].items():
            entry["ratio"] = {name: ratio(baseline["levels"][level], entry, name) for name in SERVER_FIGURES}
