"""What a person sees first of a traced process: how it started, what was refused, what changed, and a few numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onegraph.debug.report_words import seconds

_STARTS = {
    "cold": ("cold start", "accent"),
    "warm": ("warm start", "good"),
    "eager": ("nothing compiled", ""),
    "refused": ("compile refused", "bad"),
    "failed": ("compile failed", "bad"),
    "unknown": ("no compile in this trace", "warn"),
}

_HEAD_LINES = 8


@dataclass(frozen=True)
class Figure:
    """One number with its name, and a line about it."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class ToldFailure:
    """A compile that ended with an error: `head` says what and where, `more` what to do, or the rest."""

    title: str
    head: str
    more: str
    user: str | None
    is_ours: bool


@dataclass(frozen=True)
class Verdict:
    """The first screen. `refused` are constraints, `changed` are facts of the recorded trace that hold no longer."""

    start: str
    tone: str
    refused: tuple[Mapping[str, Any], ...]
    failures: tuple[ToldFailure, ...]
    changed: tuple[Mapping[str, Any], ...]
    figures: tuple[Figure, ...]


def verdict(facts: Mapping[str, Any]) -> Verdict:
    """Of one process's facts."""
    start, tone = _STARTS[facts["start"]]
    evaluation = facts["ledger_evaluation"]
    refused = tuple(one for one in facts["constraints"] if one["effect"] == "narrows")
    return Verdict(
        start=start,
        tone=tone,
        refused=refused,
        failures=tuple(_failure(one, is_told=bool(refused)) for one in facts["failures"]),
        changed=tuple(one for one in evaluation["checks"] if not one["holds"]) if evaluation else (),
        figures=tuple(one for one in (_first_token(facts), *_store(facts), _pieces(facts), *_step(facts)) if one),
    )


def _failure(failure: Mapping[str, Any], is_told: bool) -> ToldFailure:
    """`is_told` says that the constraint stands there already; then only the ways out are news."""
    reason = str(failure["reason"]).strip("\n")
    if not reason.startswith("[OG-"):
        lines = reason.splitlines()
        head, more = "\n".join(lines[:_HEAD_LINES]), "\n".join(lines[_HEAD_LINES:])
        return ToldFailure(f"torch gave up a compile: {failure['kind']}", head, more, failure["user"], False)
    head, _, ways = reason.partition("\n  to do: ")
    if failure["kind"] == "ConstraintError":
        title = (
            "What to do"
            if is_told
            else "The compile was refused: the model works only for a part of the declared range."
        )
        return ToldFailure(title, "" if is_told else head, ways, None, True)
    return ToldFailure(f"The compile ended with an error: {failure['kind']}", head, ways, None, True)


def _first_token(facts: Mapping[str, Any]) -> Figure | None:
    timeline = facts["timeline"]
    if timeline is None:
        return None
    if timeline["first_token_s"] is not None:
        ready = timeline["ready_s"]
        detail = "" if ready is None else f"ready after {seconds(ready)}"
        return Figure("first token after", seconds(timeline["first_token_s"]), detail)
    if timeline["ready_s"] is not None:
        return Figure("ready after", seconds(timeline["ready_s"]), "no token in this trace")
    total = sum(event["seconds"] for event in timeline["events"] if not event["name"].startswith("piece "))
    return Figure("stages took", seconds(total), "this trace has no first token")


def _store(facts: Mapping[str, Any]) -> list[Figure]:
    store, found = facts["store"], []
    if store["index"] is not None:
        found.append(Figure("index", store["index"]["status"], store["index"]["why"]))
    number = store["hits"] + store["misses"] + store["off"]
    if number:
        compiled = f"{store['misses']} compiled" if store["misses"] else "nothing compiled"
        off = f", {store['off']} not stored" if store["off"] else ""
        found.append(Figure("artifacts from the store", f"{store['hits']} of {number}", compiled + off))
    return found


def _pieces(facts: Mapping[str, Any]) -> Figure | None:
    if not facts["pieces"]:
        return None
    members = sum(len(group["indices"]) for group in facts["pieces"])
    distinct = sum(group["kind"] == "compiled" for group in facts["pieces"])
    return Figure("pieces", f"{members:,}", f"{distinct} that differ are compiled")


def _step(facts: Mapping[str, Any]) -> list[Figure]:
    if facts["profile"] is not None:
        return [
            Figure("one step", seconds(facts["profile"]["seconds_per_step"]), f"mean of {facts['profile']['steps']}")
        ]
    if facts["recordings"] is not None:
        sizes = len(facts["recordings"]["sizes"])
        return [Figure("recorded sizes", str(sizes), str(facts["recordings"]["mode"] or ""))]
    return []
