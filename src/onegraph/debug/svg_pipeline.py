"""The pipeline as a picture: a box for each stage with its number, beside one another or, on a phone, below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from onegraph.debug.svg_element import element

_WIDTH, _HEIGHT, _GAP = 160, 112, 24
_ROW, _ROW_GAP = 62, 18
_MOST_CHARS = 25


@dataclass(frozen=True)
class StageBox:
    """One stage: its name, its number, a line about it, and where the report says more."""

    title: str
    figure: str
    detail: str
    href: str


def stage_boxes(facts: Mapping[str, Any]) -> list[StageBox]:
    """The stages of one process in words and numbers; a dash stands for what the trace doesn't tell."""
    pieces, store, passes = facts["pieces"], facts["store"], facts["passes"]
    members = sum(len(group["indices"]) for group in pieces) or None
    compiled = [group["indices"] for group in pieces if group["kind"] == "compiled"]
    differ = f"{len(compiled)} differ, {sum(map(len, compiled))} compiled"
    rewrites = sum(one["rewrites"] for one in passes) if passes else None
    found = store["hits"] + store["misses"] + store["off"]
    index = f"index: {store['index']['status']}" if store["index"] else ""
    recordings = facts["recordings"] or {"mode": None, "sizes": None}
    recorded = None if recordings["sizes"] is None else len(recordings["sizes"])
    return [
        _box("captured graph", _counted(facts["graph"]["ops"], "op"), _dims(facts["graph"]["dims"]), "#constraints"),
        _box("split", _counted(members, "piece"), differ, "#pieces"),
        _box("passes", _counted(rewrites, "rewrite"), f"{sum(not one['skipped'] for one in passes)} ran", "#passes"),
        _box("compile or load", f"{store['hits']} of {found} hit" if found else None, index, "#store"),
        _box("plan", _counted(members, "call"), "one Python function", "#store"),
        _box("recordings", _counted(recorded, "size"), str(recordings["mode"] or ""), "#recordings"),
    ]


def _box(title: str, figure: str | None, detail: str, href: str) -> StageBox:
    return StageBox(title, "–", "", href) if figure is None else StageBox(title, figure, detail, href)


def _counted(number: int | None, what: str) -> str | None:
    if number is None:
        return None
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _dims(dims: Sequence[Mapping[str, Any]]) -> str:
    told = [f"{dim['name']} {dim['min']}..{dim['max']}" for dim in dims[:1]]
    return ", ".join([*told, *(["…"] if len(dims) > 1 else [])]) or "sizes as they came"


def pipeline_across(boxes: Sequence[StageBox]) -> Markup:
    """For wide screens: one row, scaled to the width."""
    parts = []
    for number, box in enumerate(boxes):
        left = number * (_WIDTH + _GAP)
        middle = left + _WIDTH / 2
        inner = [
            element("title", f"{box.title}: {box.figure}, {box.detail}"),
            element("rect", x=left + 0.5, y=0.5, width=_WIDTH - 1, height=_HEIGHT - 1, rx=10),
            element("text", box.title, x=middle, y=30, class_="title", text_anchor="middle"),
            element("text", _cut(box.figure, 15), x=middle, y=62, class_="figure", text_anchor="middle"),
            element("text", _cut(box.detail), x=middle, y=90, class_="detail", text_anchor="middle"),
        ]
        parts.append(element("a", *inner, href=box.href))
        if number:
            parts.append(
                _arrow(f"M{left - _GAP + 4} {_HEIGHT / 2} h{_GAP - 9}", f"M{left - 9} {_HEIGHT / 2 - 4} l5 4 l-5 4")
            )
    width = len(boxes) * (_WIDTH + _GAP) - _GAP
    return element("svg", *parts, viewBox=f"0 0 {width} {_HEIGHT}", class_="pipeline across", role="group")


def pipeline_down(boxes: Sequence[StageBox]) -> Markup:
    """For phones: one below the other; text keeps its size."""
    parts = []
    for number, box in enumerate(boxes):
        top = number * (_ROW + _ROW_GAP)
        inner = [
            element("title", f"{box.title}: {box.figure}, {box.detail}"),
            element("rect", x=0.5, y=top + 0.5, width="99.6%", height=_ROW - 1, rx=10),
            element("text", box.title, x=14, y=top + 26, class_="title"),
            element("text", box.figure, x="100%", dx=-14, y=top + 27, class_="figure", text_anchor="end"),
            element("text", _cut(box.detail, 38), x=14, y=top + 47, class_="detail"),
        ]
        parts.append(element("a", *inner, href=box.href))
        if number:
            parts.append(_arrow(f"M26 {top - _ROW_GAP + 2} v{_ROW_GAP - 6}", f"M22 {top - 8} l4 5 l4 -5"))
    height = len(boxes) * (_ROW + _ROW_GAP) - _ROW_GAP
    return element("svg", *parts, width="100%", height=height, class_="pipeline down", role="group")


def _arrow(*paths: str) -> Markup:
    return Markup("").join(element("path", d=path, class_="arrow") for path in paths)


def _cut(text: str, most: int = _MOST_CHARS) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
