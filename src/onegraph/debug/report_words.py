"""How the report writes numbers, sizes, places and values: the filters of its templates."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from markupsafe import Markup, escape

from onegraph.debug.svg_element import element, percent


def seconds(value: object) -> str:
    """Three digits, in the unit that fits; a dash for what is no number."""
    if not isinstance(value, int | float):
        return "–"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= factor:
            number = value / factor
            return f"{number:,.0f} {unit}" if abs(number) >= 100 else f"{number:.3g} {unit}"
    return "0 s" if value == 0 else f"{value / 1e-9:.0f} ns"


def size(num_bytes: int) -> str:
    """Bytes in binary units."""
    number = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(number) < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:,.0f} {unit}" if unit == "bytes" or number >= 100 else f"{number:.1f} {unit}"


def moment(unix_s: float) -> str:
    """A time of day with its date, in UTC; nothing for what is none."""
    try:
        at = datetime.fromtimestamp(unix_s, UTC)
    except (OverflowError, OSError, ValueError):
        return "at an unknown time"
    return f"{at.day} {at:%B %Y, %H:%M:%S} UTC"


def shortened(text: object, most: int = 160) -> str:
    """A text on one line, cut in its middle."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most * 2 // 3]} … {line[-most // 3 :]}"


def first_lines(text: str, most: int) -> str:
    """So many lines of a text that isn't empty, on one line."""
    return shortened(" ".join(line.strip() for line in text.strip().splitlines()[:most]), 600)


def breakable(text: object) -> Markup:
    """A path or dotted name that may wrap behind its separators."""
    found = escape(text)
    for separator in ("/", ".", "_"):
        found = found.replace(separator, Markup(f"{separator}<wbr>"))
    return found


def in_package(place: object) -> str:
    """A `file:line` without the folder in which packages are installed."""
    return str(place).rpartition("site-packages/")[2]


def inside(path: Sequence[str]) -> str:
    """What a row of the profile is a part of, without the places of pieces."""
    return " › ".join(part.partition(" (")[0] for part in path)


def told(value: object) -> str:
    """A setting's value as JSON, a text as it stands, and a dash for nothing."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def listed(names: Sequence[object], most: int) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def command_line(words: Sequence[str]) -> str:
    """A command as it is typed: `onegraph …` is what its interpreter was told to run."""
    for at, word in enumerate(words):
        is_module = word == "onegraph.cli.main" and words[at - 1] == "-m"
        if is_module or (at == 1 and PurePath(word).name == "onegraph"):
            return shlex.join(["onegraph", *words[at + 1 :]])
    return shlex.join([PurePath(word).name for word in words[:1]] + list(words[1:]))


def span(names: Sequence[str]) -> str:
    """The first and the last of many module paths."""
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} … {names[-1]}"


def runs(numbers: Sequence[int]) -> str:
    """Numbers with those that follow one another in the same steps as ranges: `2, 4, …, 58 (29)` or `1..16`."""
    ordered = sorted(set(numbers))
    if len(ordered) < 4:
        return ", ".join(map(str, ordered))
    steps = {after - before for before, after in itertools.pairwise(ordered)}
    if steps == {1}:
        return f"{ordered[0]}..{ordered[-1]}"
    return f"{', '.join(map(str, ordered[:2]))}, …, {ordered[-1]}" if len(steps) == 1 else listed(ordered, 12)


def from_to(edges: Sequence[int | None]) -> str:
    """A range with its ends; None is no end."""
    low, high = (*edges, None)[:2]
    return f"{low}" if low == high else f"{'' if low is None else low}..{'' if high is None else high}"


def sizes(one: Mapping[str, Any]) -> str:
    """For which sizes an artifact is."""
    if one["predicate"]:
        return str(one["predicate"])
    return "all" if one["min"] is None and one["max"] is None else from_to((one["min"], one["max"]))


def differing(rows: Sequence[object]) -> str:
    """The fields in which two artifacts' keys differ, with their values."""
    found = []
    for row in rows[:6]:
        if isinstance(row, Mapping):
            found.append(f"{row.get('field')} ({shortened(row.get('was'), 40)} → {shortened(row.get('is'), 40)})")
        else:
            found.append(shortened(row, 80))
    return listed(found, 6) + (f" and {len(rows) - 6} more" if len(rows) > 6 else "")


def change(row: Mapping[str, Any]) -> str:
    """How much longer or shorter something takes."""
    if not row["was"] or row["is"] is None:
        return "–"
    ratio = row["is"] / row["was"]
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"


def share(part: float) -> str:
    """A part of the whole in percent."""
    return f"{100 * part:.1f} %" if part >= 0.001 else "< 0.1 %"


def share_bar(part: float) -> Markup:
    """The same as a bar."""
    bars = (
        element("rect", width="100%", height=8, rx=4, class_="all"),
        element("rect", width=percent(min(max(part, 0.0), 1.0)), height=8, rx=4, class_="part"),
    )
    return element("svg", *bars, class_="share", aria_hidden="true")


FILTERS = {
    **{
        one.__name__: one
        for one in (seconds, size, moment, shortened, first_lines, breakable, told, listed, span, runs)
    },
    **{one.__name__: one for one in (from_to, sizes, differing, change, share_bar, command_line, in_package, inside)},
    "percent": share,
}
