"""The step profile of a trace (`onegraph_profile`): rows that know their piece, and the frames of a flame picture."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from onegraph.debug.report_words import span

_PIECE = re.compile(r"piece (\d+)\b")


def profile_facts(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rows in the trace's order; `piece` is the one that a row is in or is, `self_s` its seconds without inner rows.

    `whole_s` are the seconds of the outermost row: of the step, or of the replays that some steps were instead.
    """
    if entry is None:
        return None
    rows = [_row(one) for one in entry.get("rows") or ()]
    inner: dict[tuple[str, ...], float] = {}
    for row in rows:
        parent = tuple(row["path"][:-1])
        inner[parent] = inner.get(parent, 0.0) + row["seconds_per_step"]
    for row in rows:
        path = tuple(row["path"])
        row["is_leaf"] = path not in inner
        row["self_s"] = max(0.0, row["seconds_per_step"] - inner.get(path, 0.0))
    roots = {row["path"][0]: row["seconds_per_step"] for row in rows if len(row["path"]) == 1}
    for row in rows:
        row["whole_s"] = roots.get(row["path"][0], 0.0)
    return {
        "steps": int(entry.get("steps") or 0),
        "batches": [
            {name: one.get(name) for name in ("num_tokens", "num_seqs", "kind", "count")}
            for one in entry.get("batches") or ()
        ],
        "seconds_per_step": float(entry.get("seconds_per_step") or sum(roots.values())),
        "notes": [str(note) for note in entry.get("notes") or ()],
        "rows": rows,
    }


def _row(one: Mapping[str, Any]) -> dict[str, Any]:
    path = [str(part) for part in one["path"]]
    if not path:
        raise ValueError("a row of the profile has no path")
    pieces = [int(found[1]) for found in map(_PIECE.match, path) if found]
    return {
        "path": path,
        "calls_per_step": float(one.get("calls_per_step") or 0.0),
        "seconds_per_step": float(one.get("seconds_per_step") or 0.0),
        "ops": [str(op) for op in one.get("ops") or ()],
        "user": one.get("user"),
        "module_path": one.get("module_path"),
        "piece": pieces[-1] if pieces else None,
        "is_piece": bool(_PIECE.match(path[-1])),
    }


def merged_rows(rows: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with equal pieces as one: a decoder of 60 layers has few that differ, and too many for a picture."""
    names = {
        index: f"piece {group['index']} × {len(group['indices'])}"
        for group in groups
        for index in group["indices"]
        if len(group["indices"]) > 1
    }
    places = {group["index"]: span(group["module_paths"]) for group in groups}
    heads = {index: group["index"] for group in groups for index in group["indices"]}
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        inside = [_PIECE.match(part) for part in row["path"]]
        path = tuple(
            names.get(int(piece[1]), part) if piece else part for piece, part in zip(inside, row["path"], strict=True)
        )
        if path not in found:
            place = places.get(heads.get(row["piece"], -1)) if row["is_piece"] else None
            found[path] = {**row, "path": list(path), "module_path": place or row["module_path"]}
            continue
        known = found[path]
        for name in ("calls_per_step", "seconds_per_step", "self_s"):
            known[name] += row[name]
        known["ops"] = list(dict.fromkeys([*known["ops"], *row["ops"]]))
    return list(found.values())


def frames(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where each row lies in the picture: `left` and `width` as parts of the whole, `depth` from 0 for the root.

    Rows that are inside of others lie side by side below them in the trace's order; where inner seconds sum up to more
    than the outer row's, they are drawn to its width.
    """
    children: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        children.setdefault(tuple(row["path"][:-1]), []).append(row)
    placed: list[dict[str, Any]] = []
    waiting: deque[tuple[tuple[str, ...], float, float, float]] = deque([((), 0.0, 1.0, 0.0)])
    while waiting:
        path, left, width, seconds = waiting.popleft()
        inside = children.pop(path, ())  # popped, so that a path which comes twice is not walked for ever
        total = max(seconds, sum(row["seconds_per_step"] for row in inside))
        for row in inside if total > 0 else ():
            part = width * row["seconds_per_step"] / total
            placed.append({"row": row, "left": left, "width": part, "depth": len(path)})
            waiting.append((tuple(row["path"]), left, part, row["seconds_per_step"]))
            left += part
    return placed
