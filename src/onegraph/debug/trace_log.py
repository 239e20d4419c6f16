"""Reads one file that torch's structured trace (TORCH_TRACE) wrote: onegraph's entries, and what torch says failed.

A line is a glog-like prefix and one JSON object; the lines of an entry's payload follow, each behind a tab. An entry's
object has the md5 of its payload. The file may be anybody's: what can't be read is a problem in words, never an error,
and what is too large is cut.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

LOG_GLOB = "dedicated_log_torch_trace_*.log"
"""What torch calls its files: one for each process, since nothing of ours sets a rank."""
PREFIX = "onegraph_"

_LINE = re.compile(rb"[VIWEC]\d{4} \d\d:\d\d:\d\d\.\d+ (\d+) .*?:\d+\] (\{.*)", re.DOTALL)
_STAMP = re.compile(rb"[VIWEC](\d{4} \d\d:\d\d:\d\d\.\d+) ")
_KIND = re.compile(rb'\{"(\w+)"')
_MOST_BYTES = 32 * 2**20
_LISTED_PROBLEMS = 20


@dataclass(frozen=True)
class TraceFailure:
    """What torch's own metrics say about a compile that it gave up: the kind of error, its text, the user's line."""

    kind: str
    reason: str
    user: str | None

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "reason": self.reason, "user": self.user}


_CompileId = tuple[str, str]
"""Torch's number of a compile: of the frame, and of its compile."""
_OF_A_BUILD = ("captured_graph", "constraints", "explain", "ledger")
"""Names by which an entry says that there was a build, or one that was refused."""
_OF_THE_PROCESS = ("process", "timeline")


@dataclass(frozen=True)
class TraceLog:
    """One build of a process, with what the process wrote for all. `entries` are payloads by name, without `onegraph_`;
    of several of one name the last.

    `torch_entries` counts torch's own by kind. `problems` says in words what couldn't be read. Both are the process's.
    """

    path: Path
    pid: int | None
    entries: Mapping[str, str]
    torch_entries: Mapping[str, int]
    failures: tuple[TraceFailure, ...]
    problems: tuple[str, ...]


def find_logs(folder: Path) -> list[Path]:
    """The trace files of a folder, the process that wrote first at the front; a file is its own only one."""
    if folder.is_file():
        return [folder]
    return sorted(folder.glob(LOG_GLOB), key=lambda path: (_first_stamp(path), path.name))


def _first_stamp(path: Path) -> bytes:
    with path.open("rb") as file:
        found = _STAMP.match(file.readline(4096))
    return found[1] if found else b""


def read_trace_log(path: Path) -> list[TraceLog]:
    """Reads a whole file: a log for each build that it has, or one where there is none. Raises OSError."""
    entries: dict[_CompileId, dict[str, str]] = {}
    failures: dict[_CompileId, list[TraceFailure]] = {}
    counts: Counter[str] = Counter()
    problems: list[str] = []
    pids: Counter[int] = Counter()
    for record in _records(path, problems):
        pids[record.pid] += 1
        counts[record.kind] += 1
        name = record.name
        if record.kind == "compilation_metrics":
            failures.setdefault(record.compile_id, []).extend(_failure(record.header.get("compilation_metrics")))
        elif name is not None:
            counts[record.kind] -= 1
            of_compile = entries.setdefault(record.compile_id, {})
            of_compile.pop(name, None)  # the latest stands last
            of_compile[name] = record.payload
            problems += [f"{PREFIX}{name}: {record.problem}"] if record.problem else []
    if not pids:
        problems.append("there is no entry in the form of torch's structured trace")
    hidden = len(problems) - _LISTED_PROBLEMS
    if hidden > 0:
        problems[_LISTED_PROBLEMS:] = [f"and {hidden} more of this kind"]
    return [
        TraceLog(
            path=path,
            pid=pids.most_common(1)[0][0] if pids else None,
            entries=of_build,
            torch_entries={kind: count for kind, count in counts.items() if count > 0 and kind != "str"},
            failures=tuple(dict.fromkeys(found)),
            problems=tuple(problems),
        )
        for of_build, found in _by_build(entries, failures)
    ]


def _by_build(
    entries: Mapping[_CompileId, Mapping[str, str]], failures: Mapping[_CompileId, Sequence[TraceFailure]]
) -> list[tuple[dict[str, str], list[TraceFailure]]]:
    """The entries and failures of each build, in their order; what belongs to none of them is in all."""
    builds = [one for one, found in entries.items() if any(name.startswith(_OF_A_BUILD) for name in found)]
    if len(builds) <= 1:
        every = [one for found in failures.values() for one in found]
        return [({name: text for found in entries.values() for name, text in found.items()}, every)]
    shared = {name: text for one, found in entries.items() if one not in builds for name, text in found.items()}
    latest = {name: text for found in entries.values() for name, text in found.items() if name in _OF_THE_PROCESS}
    others = [one for compile_id, found in failures.items() if compile_id not in builds for one in found]
    return [({**shared, **entries[one], **latest}, [*failures.get(one, ()), *others]) for one in builds]


class _Record(NamedTuple):
    """One entry; `header` and `payload` are read only for those that the report shows."""

    pid: int
    kind: str
    header: Mapping[str, Any]
    payload: str = ""
    problem: str | None = None

    @property
    def compile_id(self) -> _CompileId:
        """Of the compile in which it was written."""
        return str(self.header.get("frame_id")), str(self.header.get("frame_compile_id"))

    @property
    def name(self) -> str | None:
        """The name of an entry of onegraph's own, else None."""
        artifact = self.header.get("artifact")
        name = artifact.get("name") if isinstance(artifact, dict) else None
        return name.removeprefix(PREFIX) if isinstance(name, str) and name.startswith(PREFIX) else None


class _Payload:
    """Collects the lines of a payload up to a size, and their digest whatever the size."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._digest = hashlib.md5(usedforsecurity=False)
        self._kept = self._seen = 0

    def add(self, line: bytes) -> None:
        self._digest.update(b"\n" + line if self._seen else line)
        self._seen += 1
        if self._kept + len(line) <= _MOST_BYTES:
            self._lines.append(line)
            self._kept += len(line) + 1

    def ended(self, expected: object) -> tuple[str, str | None]:
        """The text, and what is wrong with it."""
        text = b"\n".join(self._lines).decode(errors="replace")
        if len(self._lines) < self._seen:
            return text, f"larger than {_MOST_BYTES // 2**20} MiB, and cut"
        if expected is not None and expected != self._digest.hexdigest():
            return text, "not whole: the file was cut, or two processes wrote into it"
        return text, None


def _records(path: Path, problems: list[str]) -> Iterator[_Record]:
    begun: _Record | None = None
    payload = _Payload()

    def finished(record: _Record) -> _Record:
        text, problem = payload.ended(record.header.get("has_payload"))
        return record._replace(payload=text, problem=problem)

    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removesuffix(b"\n")
            if line.startswith(b"\t"):
                if begun is not None and begun.name is not None:
                    payload.add(line[1:])
                continue
            if begun is not None:
                yield finished(begun)
            begun, payload = _begun(line, number, problems), _Payload()
    if begun is not None:
        yield finished(begun)


def _begun(line: bytes, number: int, problems: list[str]) -> _Record | None:
    found = _LINE.fullmatch(line)
    kind = _KIND.match(found[2]) if found else None
    if found is None or kind is None:
        if line.strip():
            problems.append(f"line {number} is no entry: {line[:60].decode(errors='replace')!r}")
        return None
    name = kind[1].decode()
    if name not in ("artifact", "compilation_metrics"):
        return _Record(int(found[1]), name, {})
    try:
        header = json.loads(found[2])
    except ValueError as error:
        problems.append(f"line {number}: the object of its entry can't be read: {error}")
        return None
    return _Record(int(found[1]), name, header)


def _failure(metrics: object) -> list[TraceFailure]:
    if not isinstance(metrics, dict) or not metrics.get("fail_type"):
        return []
    file, line = metrics.get("fail_user_frame_filename"), metrics.get("fail_user_frame_lineno")
    user = f"{file}:{line}" if isinstance(file, str) else None
    return [TraceFailure(str(metrics["fail_type"]), str(metrics.get("fail_reason") or ""), user)]
