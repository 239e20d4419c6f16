"""The facts of one traced process as plain data: what the report shows, `--json` prints, and reports are compared by.

Takes a TraceLog, gives a dict of JSON values with the same keys whatever the trace has: a part that wasn't written is
None or empty, and its name stands in `missing`. An entry of another form is a problem in words.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from onegraph.debug.piece_facts import piece_groups
from onegraph.debug.profile_facts import profile_facts
from onegraph.debug.text_pages import text_name
from onegraph.debug.trace_log import PREFIX, TraceLog

EXPECTED = (
    *("process", "timeline", "config", "captured_graph", "split_graph", "ledger", "store"),
    *("execution_plan", "recording_plan", "recordings", "explain"),
)
"""The entries of every compiled start; others come only with something that was asked for, or that happened."""


def process_facts(log: TraceLog) -> dict[str, Any]:
    """All that one process's trace says."""
    read = _Reader(log)
    explain = read.json("explain", dict) or {}
    ledger = read.json("ledger", dict) or explain.get("ledger") or {}
    constraints = read.part("constraints", lambda: _constraints(read, explain, ledger), [])
    store = read.part("store", lambda: _store(read, explain), {"root": None, "index": None, "pieces": []})
    profile = read.part("profile", lambda: profile_facts(read.json("profile", dict)), None)
    texts = {name: _text_facts(text) for name, text in log.entries.items() if text_name(name)}
    pieces = read.part("pieces", lambda: piece_groups(explain.get("pieces") or [], store["pieces"], texts, profile), [])
    facts = {
        "log": log.path.name,
        "pid": log.pid,
        "model": explain.get("model"),
        "device": explain.get("device"),
        "process": read.part("process", lambda: _process(read.json("process", dict)), None),
        "start": read.part("explain", lambda: _start(explain, constraints, log), "unknown"),
        "failures": [failure.to_dict() for failure in log.failures],
        "timeline": read.part("timeline", lambda: _timeline(read.json("timeline", dict), explain), None),
        "graph": read.part("explain", lambda: _graph(explain), {"ops": None, "dims": []}),
        "constraints": constraints,
        "state": read.part("ledger", lambda: _state(ledger), {"inputs": [], "state": [], "not_seen": None}),
        "ledger_evaluation": read.part("ledger_evaluation", lambda: _evaluation(read), None),
        "passes": read.part("explain", lambda: _passes(explain), []),
        "pieces": pieces,
        "store": {"root": store["root"], "index": store["index"], **_hits(pieces)},
        "recordings": read.part("recordings", lambda: _recordings(read, explain), None),
        "config": read.part("config", lambda: _config(read.json("config", dict) or explain.get("config")), []),
        "profile": profile,
        "texts": texts,
        "torch_entries": dict(log.torch_entries),
        "missing": [PREFIX + name for name in EXPECTED if name not in log.entries],
    }
    return {**facts, "problems": [*log.problems, *read.problems]}


class _Reader:
    """Gives entries as JSON, and parts of the facts made of them; what goes wrong is noted, and left out."""

    def __init__(self, log: TraceLog) -> None:
        self._entries = log.entries
        self.problems: list[str] = []

    def json(self, name: str, *kinds: type) -> Any:
        if name not in self._entries:
            return None
        try:
            value = json.loads(self._entries[name], parse_constant=_finite, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            self.problems.append(f"{PREFIX}{name} isn't JSON: {error}")
            return None
        if value is None:  # told that there is nothing
            return None
        if not isinstance(value, kinds):
            self.problems.append(f"{PREFIX}{name} is a {type(value).__name__} and not a {kinds[0].__name__}")
            return None
        return value

    def part(self, name: str, make: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return make()
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            self.problems.append(f"{PREFIX}{name} has another form than this version reads: {error!r}")
            return otherwise


def _finite(text: str) -> float:
    """A number that can be drawn. Raises ValueError for NaN and for what is too large."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number that can be shown")
    return number


def _graph(explain: Mapping[str, Any]) -> dict[str, Any]:
    ops = (explain.get("graph") or {}).get("ops")
    dims = [
        {
            "name": str(one["name"]),
            "min": one.get("min"),
            "max": one.get("max"),
            "inputs": [*map(str, one["inputs"] or ())],
        }
        for one in explain.get("dims") or ()
    ]
    return {"ops": None if ops is None else int(ops), "dims": dims}


def _seconds(value: Any) -> float | None:
    return None if value is None else round(float(value), 4)


def _text_facts(text: str) -> dict[str, Any]:
    return {"lines": text.count("\n") + 1, "sha256": hashlib.sha256(text.encode(errors="replace")).hexdigest()}


def _process(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {
        "pid": entry.get("pid"),
        "command": [str(word) for word in entry.get("command") or ()],
        "versions": {str(name): str(version) for name, version in (entry.get("versions") or {}).items()},
        "machine": str(entry.get("machine") or ""),
        "started_at": _seconds(entry.get("started_at")),
    }


def _start(explain: Mapping[str, Any], constraints: list[dict[str, Any]], log: TraceLog) -> str:
    """`cold`, `warm` or `eager`; `refused` where a constraint ended the compile, `failed` where torch gave up."""
    if not explain:
        if any(one["effect"] == "narrows" for one in constraints):
            return "refused"
        if any(failure.kind == "ConstraintError" for failure in log.failures):
            return "refused"
        return "failed" if log.failures else "unknown"
    compiled = [one for one in explain.get("pieces") or () if one.get("backend") == "inductor"]
    if not compiled:
        return "eager"
    return "warm" if all(each.get("store") == "hit" for one in compiled for each in one["ranges"]) else "cold"


def _timeline(entry: Mapping[str, Any] | None, explain: Mapping[str, Any]) -> dict[str, Any] | None:
    if entry is None:
        return _laid_end_to_end(explain)
    events = [
        {
            "name": str(one["name"]),
            "start_s": float(one["start_s"]),
            "seconds": float(one["seconds"]),
            "detail": str(one.get("detail") or ""),
        }
        for one in entry["events"]
    ]
    return {
        "events": sorted(events, key=lambda one: one["start_s"]),
        "ready_s": _seconds(entry.get("ready_s")),
        "first_token_s": _seconds(entry.get("first_token_s")),
        "measured": True,
    }


def _laid_end_to_end(explain: Mapping[str, Any]) -> dict[str, Any] | None:
    """Stages with their seconds, for a trace that doesn't say when each began."""
    events, at = [], 0.0
    for stage in explain.get("stages") or ():
        seconds = float(stage["seconds"])
        events.append({"name": str(stage["name"]), "start_s": round(at, 4), "seconds": seconds, "detail": ""})
        at += seconds
    return {"events": events, "ready_s": None, "first_token_s": None, "measured": False} if events else None


def _constraints(read: _Reader, explain: Mapping[str, Any], ledger: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each condition on sizes once, those that narrow the range first."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    sources = (read.json("constraints", list), ledger.get("shape"), (explain.get("ledger") or {}).get("shape"))
    for one in (one for source in sources for one in source or ()):
        fact = {name: one.get(name) for name in ("expr", "user", "framework", "stage", "effect", "source_line")}
        found.setdefault((fact["expr"], fact["user"], fact["effect"]), fact)
    order = {"narrows": 0, "split": 1}
    return sorted(found.values(), key=lambda fact: order.get(fact["effect"], 2))


def _state(ledger: Mapping[str, Any]) -> dict[str, Any]:
    state = [
        {"what": str(one["what"]), "value": str(one["value"]), "checked": one.get("checked"), "user": one.get("user")}
        for one in ledger.get("state") or ()
    ]
    inputs = [{name: str(one[name]) for name in ("path", "fact", "value")} for one in ledger.get("inputs") or ()]
    return {"inputs": inputs, "state": state, "not_seen": ledger.get("not_seen")}


def _evaluation(read: _Reader) -> dict[str, Any] | None:
    entry = read.json("ledger_evaluation", dict)
    if entry is None:
        return None
    checks = [
        {
            "what": str(one["what"]),
            "recorded": str(one.get("recorded")),
            "now": str(one.get("now")),
            "holds": bool(one.get("holds")),
        }
        for one in entry.get("checks") or ()
    ]
    checks.sort(key=lambda one: bool(one["holds"]))
    return {"held": int(entry.get("held") or 0), "checks": checks, "verdict": str(entry.get("verdict") or "")}


def _passes(explain: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": str(one["name"]),
            "rewrites": int(one.get("rewrites") or 0),
            "pieces": int(one.get("pieces") or 0),
            "seconds": float(one.get("seconds") or 0.0),
            "skipped": one.get("skipped"),
            "near_misses": [
                {"why": str(miss["why"]), "where": miss.get("where"), "pieces": int(miss.get("pieces") or 1)}
                for miss in one.get("near_misses") or ()
            ],
        }
        for one in explain.get("passes") or ()
    ]


def _store(read: _Reader, explain: Mapping[str, Any]) -> dict[str, Any]:
    entry = read.json("store", dict) or {}
    index = entry.get("index") or explain.get("index")
    return {
        "root": entry.get("root"),
        "index": None if index is None else {"status": str(index["status"]), "why": str(index.get("why") or "")},
        "pieces": [one for one in entry.get("pieces") or () if isinstance(one, dict)],
    }


def _hits(pieces: list[dict[str, Any]]) -> dict[str, int]:
    """Artifacts of distinct pieces, by what the store said."""
    found = [one["store"] for group in pieces if group["kind"] == "compiled" for one in group["ranges"]]
    return {
        "hits": found.count("hit"),
        "misses": sum(one in ("miss", "stale") for one in found),
        "off": found.count("off"),
    }


def _recordings(read: _Reader, explain: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plan, and what is recorded; `explain` has both where the trace has no entries of their own."""
    known = explain.get("plan") or {}
    plan = read.json("recording_plan", dict) or known.get("planned")
    made = read.json("recordings", dict, list)
    made = {"sizes": made} if isinstance(made, list) else made or known
    if not plan and not made:
        return None
    return {
        "mode": made.get("mode") or known.get("mode"),
        "planned": _planned(plan),
        "sizes": [
            {
                "num_tokens": one.get("num_tokens"),
                "mode": str(one.get("mode")),
                "steps": int(one.get("steps") or 0),
                "bytes": int(one.get("bytes") or 0),
                "seconds": float(one.get("seconds") or 0.0),
                "unrecorded": [
                    {"piece": left.get("piece"), "why": str(left.get("why"))} for left in one.get("unrecorded") or ()
                ],
            }
            for one in made.get("sizes") or ()
        ],
        "uncovered": [
            {"range": list(one["range"]), "why": str(one["why"])}
            for one in made.get("uncovered") or (plan or {}).get("uncovered") or ()
        ],
    }


def _planned(plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not plan:
        return None
    return {
        "sizes": {str(mode): [int(one) for one in sizes] for mode, sizes in (plan.get("sizes") or {}).items()},
        "chosen": str(plan.get("chosen") or ""),
        "lazily_at": None if plan.get("lazily_at") is None else int(plan["lazily_at"]),
    }


def _config(entry: Any) -> list[dict[str, Any]]:
    """Every setting, those that somebody or something chose before the defaults."""
    rows = [{"name": str(name), "value": one["value"], "why": str(one["why"])} for name, one in (entry or {}).items()]
    return sorted(rows, key=lambda row: row["why"] == "default")
