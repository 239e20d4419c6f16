"""A step profile as a picture: an icicle, in which each row is as wide as its time, with what it is made of below it.

Takes a profile as plain data (`StepProfile.to_dict()`, or the entry of a trace). Gives an SVG that needs nothing else:
light and dark, with each row's figures as its tooltip. A name that doesn't fit is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

WIDTH, ROW, GAP, FONT = 1200, 22, 1, 12
_CHARACTER = 0.62 * FONT
"""About as wide as a letter of a sans-serif font, on the safe side."""
_THINNEST = 0.2
"""Rows below this width, in units of the picture, aren't drawn."""
_COLOURS = ("#5b7db1", "#c0654a", "#b98a2f", "#5f8f4e", "#8a73b5", "#3f8f8f", "#a8677f", "#7d7d7d")
_STYLE = (
    "text{fill:#222;font-size:12px}rect{stroke:#fff;stroke-width:.4}.in{fill:#fff;pointer-events:none}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}rect{stroke:#1a1a1a}.in{fill:#fff}}"
)

_Path = tuple[str, ...]


def profile_svg(profile: Mapping[str, Any]) -> str:
    """The SVG's text."""
    rows = {tuple(row["path"]): row for row in profile["rows"]}
    below: dict[_Path, list[_Path]] = {}
    for path in rows:
        below.setdefault(path[:-1], []).append(path)
    roots = below.get((), [])
    whole = max((_seconds(rows[path]) for path in roots), default=0.0)
    lines: list[str] = []
    top = 2.0 * FONT
    for root in roots:
        depth = 1 + max(len(path) for path in rows if path[0] == root[0]) - len(root)
        width = WIDTH * _seconds(rows[root]) / whole if whole else 0.0
        lines += _drawn(root, 0.0, width, top, rows, below)
        top += depth * ROW + FONT
    batches = ", ".join(_batch(one) for one in profile["batches"][:3]) + (", …" if len(profile["batches"]) > 3 else "")
    title = f"{1000 * profile['seconds_per_step']:.2f} ms a step, {profile['steps']} steps: {batches}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" width="100%" '
            'font-family="sans-serif" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            f'<text x="2" y="{FONT + 3}">{escape(_fitting(title, WIDTH))}</text>',
            *lines,
            "</svg>",
            "",
        ]
    )


def _drawn(
    path: _Path,
    x: float,
    width: float,
    y: float,
    rows: Mapping[_Path, Mapping[str, Any]],
    below: Mapping[_Path, Sequence[_Path]],
) -> Iterator[str]:
    """A row's box, and those of the rows below it, side by side."""
    if width < _THINNEST:
        return
    row = rows[path]
    seconds, whole = _seconds(row), _seconds(rows[path[:1]])
    colour = _COLOURS[sum(map(ord, _family(path[-1]))) % len(_COLOURS)]
    yield (
        f'<rect x="{x:.2f}" y="{y:.0f}" width="{width:.2f}" height="{ROW - GAP}" rx="2" fill="{colour}">'
        f"<title>{escape(_tooltip(row, seconds / whole if whole else 0.0))}</title></rect>"
    )
    if name := _fitting(path[-1], width - 6):
        yield f'<text class="in" x="{x + 3:.2f}" y="{y + ROW - 7:.0f}">{escape(name)}</text>'
    inner = x
    for child in below.get(path, ()):
        wide = width * _seconds(rows[child]) / seconds if seconds else 0.0
        yield from _drawn(child, inner, wide, y + ROW, rows, below)
        inner += wide


def _seconds(row: Mapping[str, Any]) -> float:
    return float(row["seconds_per_step"])


def _family(name: str) -> str:
    """What has one colour: all pieces, and kernels of one name, whatever their sizes."""
    return name.split(" ", 1)[0]


def _fitting(text: str, width: float) -> str:
    """The text, or its beginning; nothing where that would be a few letters."""
    room = int(width / _CHARACTER)
    if len(text) <= room:
        return text
    return f"{text[: room - 1]}…" if room >= 6 else ""


def _batch(one: Mapping[str, Any]) -> str:
    return f"{one['count']} x {one['kind']} of {one['num_tokens']} tokens"


def _tooltip(row: Mapping[str, Any], share: float) -> str:
    calls = float(row["calls_per_step"])
    lines = [" › ".join(row["path"]), f"{1000 * _seconds(row):.3f} ms a step, {share:.1%}, {calls:.3g} calls"]
    ops = row.get("ops") or []
    if ops:
        lines.append(", ".join(ops[:12]) + (f" and {len(ops) - 12} more" if len(ops) > 12 else ""))
    lines += [one for one in (row.get("module_path"), row.get("user")) if one]
    return "\n".join(lines)
