"""The start-up timeline: a row for each stage and piece, each with a small picture of when it ran.

Rows are HTML, so that labels wrap and are read aloud; the pictures have a common scale of seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from onegraph.debug.svg_element import element, percent

_HEIGHT = 16
_MOST_PIECES = 10
_LOADING = ("import", "weights", "index", "load", "bind", "kernels")
_COMPILE = "compile or load"
_RUNNING = ("record", "first token")


@dataclass(frozen=True)
class TimelineRow:
    """One line of the timeline; `kind` is `loading`, `compiling` or `running`."""

    label: str
    detail: str
    seconds: float
    kind: str
    is_piece: bool
    picture: Markup


def timeline_rows(timeline: Mapping[str, Any]) -> list[TimelineRow]:
    """Rows in the order in which they began; of many pieces the slowest, and the others as one row."""
    events = timeline["events"]
    total = end_s(timeline)
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        by_name.setdefault(event["name"], []).append(event)
    pieces = sorted((name for name in by_name if name.startswith("piece ")), key=lambda name: -_sum(by_name[name]))
    if len(pieces) > _MOST_PIECES:
        others = pieces[_MOST_PIECES - 1 :]
        by_name[f"{len(others)} other pieces"] = [event for name in others for event in by_name.pop(name)]
    names = _inner_below(list(by_name))
    marks = [at for at in (timeline["ready_s"], timeline["first_token_s"]) if at is not None]
    return [_row(name, by_name[name], total, marks) for name in names]


def _inner_below(names: list[str]) -> list[str]:
    """Pieces stand right below the stage that they are a part of, where there is one."""
    if _COMPILE not in names:
        return names
    inner = [name for name in names if _is_piece(name)]
    outer = [name for name in names if not _is_piece(name)]
    at = outer.index(_COMPILE) + 1
    return [*outer[:at], *inner, *outer[at:]]


def _is_piece(name: str) -> bool:
    return name.startswith("piece ") or name.endswith(" other pieces")


def end_s(timeline: Mapping[str, Any]) -> float:
    """Where the scale ends."""
    ends = [event["start_s"] + event["seconds"] for event in timeline["events"]]
    return 1.01 * float(max([*ends, timeline["ready_s"] or 0.0, timeline["first_token_s"] or 0.0, 1e-6]))


def timeline_axis(timeline: Mapping[str, Any]) -> Markup:
    """The scale of seconds above the rows, with the moments of ready and first token."""
    total = end_s(timeline)
    step = _tick_step(total)
    parts = []
    for number in range(int(total / step) + 1):
        at = number * step / total
        anchor = "end" if at > 0.94 else "start" if at < 0.03 else "middle"
        parts.append(element("text", f"{number * step:g} s", x=percent(at), y=12, text_anchor=anchor))
        parts.append(element("line", x1=percent(at), x2=percent(at), y1=16, y2=20, class_="tick"))
    return element("svg", *parts, width="100%", height=20, class_="axis", aria_hidden="true")


def _row(name: str, events: Sequence[Mapping[str, Any]], total: float, marks: Sequence[float]) -> TimelineRow:
    seconds = _sum(events)
    kind = "loading" if name in _LOADING else "running" if name in _RUNNING else "compiling"
    parts = [
        element("line", x1=percent(at / total), x2=percent(at / total), y1=0, y2="100%", class_="mark") for at in marks
    ]
    for event in events:
        left, width = percent(event["start_s"] / total), percent(event["seconds"] / total)
        told = f"{name} {event['detail']}: {event['seconds']:.3f} s from {event['start_s']:.3f} s on"
        place = {"x": left, "y": 3, "height": _HEIGHT - 6, "rx": 2, "class_": kind}
        parts.append(element("rect", element("title", told), width=width, **place))
        parts.append(element("rect", width=2, **place))  # what took no time to speak of is still to be seen
    details = list(dict.fromkeys(event["detail"] for event in events if event["detail"]))
    return TimelineRow(
        label=name,
        detail=", ".join(details[:4]),
        seconds=seconds,
        kind=kind,
        is_piece=_is_piece(name),
        picture=element("svg", *parts, width="100%", height=_HEIGHT, aria_hidden="true"),
    )


def _sum(events: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(event["seconds"] for event in events))


def _tick_step(total: float) -> float:
    """A round number of seconds that gives at most six ticks."""
    size = 10.0**-9
    while True:
        for factor in (1, 2, 5):
            if total / (size * factor) <= 6:
                return size * factor
        size *= 10
