"""The step profile as a flame picture that hangs down: the whole step on top, what it is made of below.

Widths are parts of the step, so it fits every screen; a click on a frame widens it (report.js), a second one on the top
undoes that. What is too narrow to be seen is left out here, and stands in the table below the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from onegraph.debug.profile_facts import frames
from onegraph.debug.svg_element import element, percent

_ROW = 22
_NARROWEST = 0.0004
_FOCUSED = 0.01
"""Frames at least so wide are reached by the Tab key."""


def flame_picture(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """One picture of rows of `profile_facts`."""
    found = [frame for frame in frames(rows) if frame["width"] >= _NARROWEST]
    depth = max((frame["depth"] for frame in found), default=0) + 1
    return element(
        "svg",
        *(_frame(frame) for frame in found),
        width="100%",
        height=depth * _ROW,
        class_="flame",
        role="group",
        aria_label="where a step's time goes; the table below has the same numbers",
    )


def _frame(frame: Mapping[str, Any]) -> Markup:
    row = frame["row"]
    name = row["path"][-1]
    told = f"{name}\n{1e3 * row['seconds_per_step']:.3f} ms a step, {row['calls_per_step']:g} calls"
    told += f"\n{row['module_path']}" if row["module_path"] else ""
    told += f"\n{row['user']}" if row["user"] else ""
    told += f"\n{', '.join(row['ops'][:8])}" if row["ops"] else ""
    kind = "piece" if row["is_piece"] else "kernel" if row["piece"] is not None else "engine"
    return element(
        "svg",
        element("title", told),
        element("rect", width="100%", height=_ROW - 2, rx=3),
        element("text", name, x=6, y=14),
        x=percent(frame["left"]),
        y=frame["depth"] * _ROW,
        width=percent(frame["width"]),
        height=_ROW - 2,
        class_=f"frame {kind}",
        tabindex=0 if frame["width"] >= _FOCUSED else None,
        role="img",
        aria_label=told.replace("\n", ", "),
        data_left=frame["left"],
        data_width=frame["width"],
    )
