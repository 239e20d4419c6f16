"""The pieces of a traced process: those that share one artifact as one group, with what each other part says of them.

A decoder of 60 layers has 121 pieces and few that differ, so a group is what a person reads: its own texts, its
artifacts and why the store had them or not, its share of a step, its kernels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

PIECE_TEXT = re.compile(r"piece_(\d+)(?:_range_(\w+?)_(\w+?))?_(before_passes|after_(\w+)|output_code)")


def piece_groups(
    explained: Iterable[Mapping[str, Any]],
    stored: Iterable[Mapping[str, Any]],
    texts: Iterable[str],
    profile: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """Groups in the order of their first pieces. Without an explanation the names of the texts tell the pieces."""
    heads: dict[Any, dict[str, Any]] = {}
    for one in explained:
        heads.setdefault(_same(one), _group(one))["indices"].append(int(one["index"]))
    groups = list(heads.values()) or [_unexplained(index) for index in sorted(_pieces_of(texts))]
    kept = list(stored)
    for group in groups:
        group["module_paths"] = _module_paths(group, explained)
        _add_store(group, kept)
        group["texts"] = _texts_of(group, texts)
        group.update(_profiled(group, profile))
    return groups


def _same(piece: Mapping[str, Any]) -> Any:
    """What pieces of one group share: an artifact, or the reason for which the graph is cut there."""
    if piece.get("kind") == "splitting_op":
        return piece.get("why") or piece["index"]
    return int(piece["index"] if piece.get("same_as") is None else piece["same_as"])


def _group(piece: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "index": int(piece["index"]),
        "indices": [],
        "kind": str(piece.get("kind")),
        "backend": str(piece.get("backend") or ""),
        "ops": piece.get("ops"),
        "why": str(piece.get("why") or ""),
        "differs_from": piece.get("differs_from"),
        "passes": {str(name): int(count) for name, count in (piece.get("passes") or {}).items()},
        "ranges": [_range(one) for one in piece.get("ranges") or ()] if piece.get("kind") == "compiled" else [],
    }


def _unexplained(index: int) -> dict[str, Any]:
    group = _group({"index": index, "kind": "compiled"})
    return {**group, "indices": [index]}


def _range(one: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: one.get(name) for name in ("min", "max", "predicate", "key", "seconds")}
    return {
        **known,
        "store": str(one.get("store") or ""),
        "why": str(one.get("why") or ""),
        "edited": bool(one.get("edited")),
        "nearest": None,
        "differs": [],
        "folder": None,
    }


def _module_paths(group: Mapping[str, Any], explained: Iterable[Mapping[str, Any]]) -> list[str]:
    members = set(group["indices"])
    paths = (str(one.get("module_path") or "") for one in explained if one["index"] in members)
    return list(dict.fromkeys(path for path in paths if path))


def _add_store(group: dict[str, Any], stored: list[Mapping[str, Any]]) -> None:
    """What the store's own entry says beyond the explanation: the nearest artifact, what differs, the folder."""
    ours = [one for one in stored if one.get("index") in group["indices"]]
    if not group["ranges"]:
        group["ranges"] = [_of_store(one) for one in ours if one.get("index") == group["index"]]
    for one in group["ranges"]:
        found = [entry for entry in ours if _is_of(entry, one)]
        for entry in found[:1]:
            one["nearest"] = entry.get("nearest")
            one["differs"] = list(entry.get("differs") or ())
            one["folder"] = entry.get("folder")
            one["why"] = one["why"] or str(entry.get("why") or "")


def _of_store(entry: Mapping[str, Any]) -> dict[str, Any]:
    low, high = entry.get("range") or (None, None)
    return _range({**entry, "min": low, "max": high})


def _is_of(entry: Mapping[str, Any], one: Mapping[str, Any]) -> bool:
    if entry.get("key") and one["key"]:
        return bool(entry["key"] == one["key"])
    return list(entry.get("range") or (None, None)) == [one["min"], one["max"]]


def _pieces_of(texts: Iterable[str]) -> set[int]:
    return {int(found[1]) for found in map(PIECE_TEXT.fullmatch, texts) if found}


def _texts_of(group: Mapping[str, Any], texts: Iterable[str]) -> list[dict[str, Any]]:
    """The group's texts by region, in the order of the trace; those of its first piece that has any."""
    by_piece: dict[int, dict[str, dict[str, Any]]] = {}
    for name in texts:
        found = PIECE_TEXT.fullmatch(name)
        if found is None or int(found[1]) not in group["indices"]:
            continue
        label = "" if found[2] is None else f"{found[2]} to {found[3]}"
        regions = by_piece.setdefault(int(found[1]), {})
        region = regions.setdefault(label, {"region": label, "graphs": [], "code": None})
        if found[4] == "output_code":
            region["code"] = name
        else:
            region["graphs"].append({"pass": found[5], "name": name})
    for piece in sorted(by_piece):
        for region in by_piece[piece].values():
            region["graphs"].sort(key=lambda graph: graph["pass"] is not None)  # before all passes comes first
        return list(by_piece[piece].values())
    return []


def _origin(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"user": row["user"], "module_path": row["module_path"]}


def _profiled(group: Mapping[str, Any], profile: Mapping[str, Any] | None) -> dict[str, Any]:
    """The group's seconds and share of a step, and its kernels, the slowest first; None without a profile."""
    if profile is None:
        return {"seconds_per_step": None, "share": None, "kernels": []}
    members = set(group["indices"])
    kernels: dict[str, dict[str, Any]] = {}
    seconds = whole = 0.0
    for row in profile["rows"]:
        if row["piece"] not in members:
            continue
        if row["is_piece"]:
            seconds, whole = seconds + row["seconds_per_step"], row["whole_s"]
        elif row["is_leaf"]:
            kernel = kernels.setdefault(row["path"][-1], {"calls": 0.0, "seconds": 0.0, "ops": [], **_origin(row)})
            kernel["calls"] += row["calls_per_step"]
            kernel["seconds"] += row["seconds_per_step"]
            kernel["ops"] = list(dict.fromkeys([*kernel["ops"], *row["ops"]]))
    return {
        "seconds_per_step": seconds,
        "share": seconds / whole if whole else None,
        "kernels": sorted(({"name": name, **one} for name, one in kernels.items()), key=lambda one: -one["seconds"]),
    }
