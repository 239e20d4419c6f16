"""What differs between two traced processes: versions, config, graph, constraints, pieces, code, store and times.

Works on the facts of reports alone, so that a report can be compared with one of another machine or version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onegraph.errors import TraceError

FACTS_FILE = "facts.json"
FORMAT = 1
"""Of facts.json; a report of another format can't be compared."""


def read_facts(place: Path) -> dict[str, Any]:
    """The facts of a report: its folder, or its facts.json. Raises TraceError."""
    path = place / FACTS_FILE if place.is_dir() else place
    hint = "give the folder that `onegraph trace` made, or its facts.json"
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TraceError(f"there are no facts of a trace: {error}", where=str(path), hint=hint) from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or not isinstance(facts.get("processes"), list):
        raise TraceError("this isn't the facts of a trace in this version's form", where=str(path), hint=hint)
    return facts


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """`{topic: [{"name", "was", "is", "why"}]}` of two processes' facts; None stands for what isn't there."""
    topics: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "versions": _versions,
        "config": lambda facts: {row["name"]: row["value"] for row in facts["config"]},
        "graph": _graph,
        "constraints": lambda facts: {f"{one['expr']} ({one['user']})": one["effect"] for one in facts["constraints"]},
        "code": lambda facts: {name: text["sha256"][:12] for name, text in facts["texts"].items()},
        "store": _store,
    }
    found = {topic: _differences(read(before), read(after)) for topic, read in topics.items()}
    why = {
        side: {row["name"]: row["why"] for row in facts["config"]} for side, facts in (("was", before), ("is", after))
    }
    for row in found["config"]:
        row["why"] = " → ".join(dict.fromkeys(why[side].get(row["name"], "not there") for side in ("was", "is")))
    return {**found, "time": _times(before, after)}


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys([*was, *now]))
    return [
        {"name": name, "was": was.get(name), "is": now.get(name), "why": ""}
        for name in names
        if was.get(name) != now.get(name)
    ]


def _versions(facts: Mapping[str, Any]) -> dict[str, Any]:
    process = facts["process"] or {}
    return {**(process.get("versions") or {}), "machine": process.get("machine"), "device": facts["device"]}


def _graph(facts: Mapping[str, Any]) -> dict[str, Any]:
    compiled = [group for group in facts["pieces"] if group["kind"] == "compiled"]
    return {
        "model": facts["model"],
        "operations": facts["graph"]["ops"],
        "pieces": sum(len(group["indices"]) for group in facts["pieces"]),
        "pieces that differ": len(compiled),
        "facts of Python state": len(facts["state"]["state"]),
        **{f"rewrites of {one['name']}": one["rewrites"] for one in facts["passes"]},
    }


def _store(facts: Mapping[str, Any]) -> dict[str, Any]:
    index = facts["store"]["index"] or {}
    keys = {
        f"key of piece {group['index']}{_region(one)}": (one["key"] or "")[:16] or None
        for group in facts["pieces"]
        for one in group["ranges"]
    }
    decisions = {
        f"piece {group['index']}{_region(one)}": one["store"] for group in facts["pieces"] for one in group["ranges"]
    }
    return {"start": facts["start"], "index": index.get("status"), **decisions, **keys}


def _region(one: Mapping[str, Any]) -> str:
    return f" where {one['predicate']}" if one["predicate"] else ""


def _times(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Seconds of all stages, whether or not they differ: no two runs have the same."""
    was, now = _seconds(before), _seconds(after)
    return [{"name": name, "was": was.get(name), "is": now.get(name), "why": ""} for name in {**was, **now}]


def _seconds(facts: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    timeline = facts["timeline"] or {"events": ()}
    for event in timeline["events"]:
        if not event["name"].startswith("piece "):
            found[event["name"]] = found.get(event["name"], 0.0) + event["seconds"]
    for name in ("ready_s", "first_token_s"):
        if timeline.get(name) is not None:
            found[name.removesuffix("_s").replace("_", " ") + " after"] = timeline[name]
    if facts["profile"] is not None:
        found["one step"] = facts["profile"]["seconds_per_step"]
    return {name: round(seconds, 6) for name, seconds in found.items()}
