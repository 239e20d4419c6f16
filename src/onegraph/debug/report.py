"""Builds the report of a trace: one folder of static pages, which need no network, above tlparse's own.

Takes the trace's files and nothing of the process that wrote them. All text of a trace is escaped, and the pages'
policy lets in no script and no address but our own. The layout: `index.html`, `pages/`, `texts/` for one build of one
process, with several the same in a folder for each and a front page; `facts.json`; `tlparse/<process>/`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from onegraph.debug.compare import FACTS_FILE, FORMAT, compare, read_facts
from onegraph.debug.profile_facts import merged_rows
from onegraph.debug.report_facts import process_facts
from onegraph.debug.report_folder import refuse_folder, unwritable
from onegraph.debug.report_words import FILTERS
from onegraph.debug.svg_flame import flame_picture
from onegraph.debug.svg_pipeline import pipeline_across, pipeline_down, stage_boxes
from onegraph.debug.svg_timeline import timeline_axis, timeline_rows
from onegraph.debug.text_pages import MOST_LINES, PLAIN_TEXTS, code_lines, diff_lines, piece_regions
from onegraph.debug.tlparse_report import TlparseReport, render_with_tlparse
from onegraph.debug.trace_log import TraceLog, read_trace_log
from onegraph.debug.traced_command import TracedRun
from onegraph.debug.verdict import verdict
from onegraph.errors import TraceError
from onegraph.version import __version__

_MOST_ROWS = 2_000
_MOST_COMPARED = 60


def build_report(
    folder: Path, logs: Sequence[Path], *, run: TracedRun | None = None, other: Path | None = None
) -> dict[str, Any]:
    """Writes the report of these files and gives its facts. `other` is a report to compare with.

    Raises TraceError where there is no trace, `other` is no report, or the folder can't be written or has other things.
    """
    refuse_folder(folder)
    traces = [trace for path in logs for trace in read_trace_log(path)]
    if all(trace.pid is None for trace in traces):
        told, hint = (
            "there is no trace",
            "torch writes one when something is compiled: does the command compile anything?",
        )
        if run is not None and run.exit_code != 0:
            told, hint = f"the command ended with exit code {run.exit_code} before it wrote a trace", "see what it said"
        raise TraceError(told, where=", ".join(map(str, logs)) or str(folder), hint=hint)
    found = [process_facts(trace) for trace in traces]
    names = ["."] if len(traces) == 1 else _folder_names(found)
    for facts, name in zip(found, names, strict=True):
        facts["folder"] = name
    comparisons = _compared(found, other)
    whole = {
        "format": FORMAT,
        "onegraph": __version__,
        "run": None if run is None else asdict(run),
        "processes": found,
        "compare": None if other is None else comparisons,
    }
    try:
        _write_report(folder, whole, traces, run, other)
    except OSError as error:
        raise unwritable(folder, error) from error
    return whole


def _write_report(
    folder: Path, whole: Mapping[str, Any], traces: Sequence[TraceLog], run: TracedRun | None, other: Path | None
) -> None:
    found = whole["processes"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS_FILE).write_text(json.dumps(whole, indent=1, default=str))
    rendered: dict[Path, TlparseReport] = {}
    for trace, facts, differences in zip(traces, found, whole["compare"] or [None] * len(found), strict=True):
        if trace.path not in rendered:
            name = f"process-{facts['pid']}" if facts["folder"] == "." else facts["folder"]
            rendered[trace.path] = render_with_tlparse(trace.path, folder / "tlparse" / name)
        _ProcessReport(folder, facts, trace, run).write(rendered[trace.path], differences, other)
    if len(found) > 1:
        _write_front_page(folder, found, run)


def _folder_names(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A folder for each build, by its process's number; several of one process, or of one number, are told apart."""
    names: list[str] = []
    for facts in found:
        name = f"process-{facts['pid']}"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names


def _compared(found: Sequence[Mapping[str, Any]], other: Path | None) -> list[dict[str, Any] | None]:
    """Each build beside the other report's of the same model, in their order; one alone beside one alone."""
    if other is None:
        return [None] * len(found)
    befores = read_facts(other)["processes"]
    by_model: dict[Any, list[Any]] = {}
    for before in befores:
        by_model.setdefault(before.get("model"), []).append(before)
    differences: list[dict[str, Any] | None] = []
    for facts in found:
        same = befores if len(befores) == len(found) == 1 else by_model.get(facts["model"], [])
        if not same:
            differences.append(None)
            continue
        before = same.pop(0)
        try:
            topics = compare(before, facts)
        except (AttributeError, KeyError, TypeError) as error:
            raise TraceError(
                f"the facts of the other trace can't be compared: {error!r}",
                where=str(other),
                hint="build its report anew with this version: onegraph trace --from",
            ) from error
        differences.append({"against": str(other), "folder": str(before.get("folder") or "."), "topics": topics})
    return differences


@lru_cache(maxsize=1)
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("onegraph.debug"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    environment.filters.update(FILTERS)
    for name, file in (("style", "report.css"), ("script", "report.js")):
        # As the page has them: the policy of each page names their digests, and nothing else is run or applied.
        text = Path(__file__).with_name("templates").joinpath(file).read_text()
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        environment.globals.update({name: Markup(text), f"{name}_hash": f"sha256-{digest}"})
    environment.globals["most_rows"] = _MOST_ROWS
    return environment


def _write(path: Path, template: str, **facts: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_templates().get_template(f"{template}.html.j2").render(facts), errors="replace")


class _ProcessReport:
    """The pages of one process."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], trace: TraceLog, run: TracedRun | None) -> None:
        self._top = folder
        self._folder = folder / facts["folder"]
        self._facts = facts
        self._entries = trace.entries
        self._run = run
        self._is_one_of_several = facts["folder"] != "."

    def write(self, tlparse: TlparseReport, differences: Mapping[str, Any] | None, other: Path | None) -> None:
        for made in ("pages", "texts"):  # of a report that was built here before
            shutil.rmtree(self._folder / made, ignore_errors=True)
        (self._folder / "texts").mkdir(parents=True)
        for name in self._facts["texts"]:
            (self._folder / "texts" / f"{name}.txt").write_text(self._entries[name], errors="replace")
        self._write_texts()
        for group in self._facts["pieces"]:
            regions = piece_regions(group, self._entries)
            self._page(f"piece-{group['index']}", "piece", group=group, regions=regions)
        if differences is not None and other is not None:
            top = other if other.is_dir() else other.parent
            texts = top / differences["folder"] / "texts"
            rows = differences["topics"]["code"]
            differences = {**differences, "pages": self._write_changed_texts(rows, texts, str(other))}
        self._write_index(tlparse, differences)

    def _page(self, name: str, template: str, **facts: Any) -> None:
        _write(self._folder / "pages" / f"{name}.html", template, model=self._facts["model"], **facts)

    def _write_texts(self) -> None:
        for name, (title, about) in PLAIN_TEXTS.items():
            if name in self._facts["texts"]:
                lines = code_lines(self._entries[name])
                cut = self._facts["texts"][name]["lines"] > MOST_LINES
                self._page(name, "text", title=title, about=about, lines=lines, cut=cut, raw=name, diff=False)

    def _write_changed_texts(self, rows: Sequence[Mapping[str, Any]], folder: Path, other: str) -> set[str]:
        """A page for each text that both reports have, and that differs; the other's stand in `folder`."""
        written = set()
        for row in rows[:_MOST_COMPARED]:
            name = row["name"]
            before = folder / f"{name}.txt"
            if name in self._facts["texts"] and row["was"] is not None and before.is_file():
                lines = diff_lines(before.read_text(errors="replace"), self._entries[name])
                about = f"What changed since {other}."
                title = f"Differences of {name}"
                self._page(
                    f"compare-{name}", "text", title=title, about=about, lines=lines, cut=False, raw=name, diff=True
                )
                written.add(name)
        return written

    def _write_index(self, tlparse: TlparseReport, differences: Mapping[str, Any] | None) -> None:
        facts, boxes = self._facts, stage_boxes(self._facts)
        root = "../" if self._is_one_of_several else ""
        timeline, profile = facts["timeline"], facts["profile"]
        rows = merged_rows(profile["rows"], facts["pieces"]) if profile else []
        href = None if tlparse.page is None else root + tlparse.page.relative_to(self._top).as_posix()
        _write(
            self._folder / "index.html",
            "index",
            facts=facts,
            run=self._run,
            root=root,
            up=self._is_one_of_several,
            verdict=verdict(facts),
            sections=_sections(facts, differences),
            axis=timeline_axis(timeline) if timeline else "",
            timeline=timeline_rows(timeline) if timeline else [],
            has_pipeline=any(box.figure != "–" for box in boxes),
            pipeline_across=pipeline_across(boxes),
            pipeline_down=pipeline_down(boxes),
            piece_count=f"{sum(len(group['indices']) for group in facts['pieces']):,}",
            artifacts=[(group, one) for group in facts["pieces"] for one in group["ranges"]],
            flame=flame_picture(rows),
            slowest=sorted(rows, key=lambda row: -row["self_s"])[:_MOST_ROWS],
            differences=differences,
            tlparse={"href": href, "why": tlparse.why},
        )


def _sections(facts: Mapping[str, Any], differences: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [
        *(("start-up", "Start-up"), ("pipeline", "Pipeline"), ("constraints", "Constraints and state")),
        *(("pieces", "Pieces"), ("store", "Store"), ("recordings", "Recordings")),
        *([("step", "Step")] if facts["profile"] else []),
        *([("differences", "Differences")] if differences else []),
        *(("config", "Config"), ("raw", "Below")),
    ]


def _write_front_page(folder: Path, found: Sequence[Mapping[str, Any]], run: TracedRun | None) -> None:
    """With several builds: one line for each, and the way to its report."""
    rows = []
    for facts in found:
        told = verdict(facts)
        figures = {figure.name: figure.value for figure in told.figures}
        rows.append({"folder": facts["folder"], "facts": facts, "verdict": told, "figures": figures})
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    num_processes = len({facts["log"] for facts in found})
    title = f"{len(found)} builds of one process" if num_processes == 1 else f"{num_processes} processes"
    if 1 < num_processes < len(found):
        title += f", {len(found)} builds"
    _write(folder / "index.html", "processes", title=title, processes=rows, figure_names=names, run=run)
