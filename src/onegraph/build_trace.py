"""What a build leaves in torch's structured trace (TORCH_TRACE) and in torch's logs (TORCH_LOGS), cold and warm alike.

Takes the records of a build, fresh or from the index, and writes them as entries named `onegraph_…`; docs/trace.md has
the list. Where neither a trace nor a log is asked for, nothing is written, and only the texts of graphs are made: they
are kept for the traces of later starts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

import onegraph.version
from onegraph.capture.regions import covered_range
from onegraph.compilers.loading import WRAPPER
from onegraph.errors import CaptureError, ConstraintError, OnegraphError
from onegraph.explanation import Explanation, PieceExplanation, RangeExplanation
from onegraph.ir.dims import DynamicDim
from onegraph.ir.ledger import LedgerCheck, ShapeEntry
from onegraph.ir.plan import ExecutionPlan
from onegraph.ir.region import Region
from onegraph.ir.target import Target
from onegraph.store.store import Store
from onegraph.store.unpacked import unpacked_folder
from onegraph.targets import describe_target
from onegraph.timeline import timeline
from onegraph.torch_compat.structured_trace import (
    trace_constraint,
    trace_is_written,
    trace_json,
    trace_link,
    trace_text,
)
from onegraph.torch_compat.torch_logs import log_artifact, log_dynamic


class GraphTexts:
    """The graphs of one region on their way through the stages, as text: written into the trace as they come.

    `packed` is for the record of the build. Entries of one region of several have its sizes in their names, as `where`.
    """

    def __init__(self, region: Region | None, where: str = "") -> None:
        self._region, self._where = region, where
        self._texts: dict[str, str] = {}
        self._distinct: set[int] = set()

    @classmethod
    def of(cls, region: Region, dims: Sequence[DynamicDim]) -> GraphTexts:
        return cls(region, "" if region.predicate is None else _range(*covered_range(dims, region.predicate)))

    @classmethod
    def kept(cls, packed: bytes, region: Region) -> GraphTexts:
        """Those that another process has packed, written now."""
        where, texts = json.loads(zlib.decompress(packed))
        made = cls(region, where)
        for name, text in texts.items():
            trace_text(name, functools.partial(str, text))
        log_artifact("graph_code", lambda: texts[f"captured_graph{where}"])
        return made

    def captured(self, graph_module: torch.fx.GraphModule) -> None:
        """The whole graph."""
        self._add(f"captured_graph{self._where}", graph_module)

    def passed(self, piece: int, name: str, graph_module: torch.fx.GraphModule) -> None:
        """Of a piece, after the pass of this name, or before all of them.

        Those that are the same as an earlier one are rewritten alike, and aren't shown; nor are the ops behind them.
        """
        if not name:
            self._distinct.add(piece)
        elif piece not in self._distinct and piece - 1 not in self._distinct:
            return
        self._add(f"{self._piece(piece, self._region)}_{f'after_{name}' if name else 'before_passes'}", graph_module)

    def code(self, piece: int, region: Region | None, code: Callable[[], str], *, is_logged: bool = False) -> None:
        """What was compiled of a piece for a region; `is_logged` says that torch has printed it in its way."""
        name = f"{self._piece(piece, region)}_output_code"
        trace_text(name, code)
        if not is_logged:
            log_artifact("output_code", lambda: f"Output code of {name.removesuffix('_output_code')}:\n{code()}")

    def split(self, plan: ExecutionPlan, pieces: Sequence[PieceExplanation]) -> None:
        """The graph of the pieces; it follows from the plan, so it isn't kept."""
        trace_text(f"split_graph{self._where}", lambda: split_text(plan, pieces))

    @property
    def packed(self) -> bytes:
        """All of them, compressed."""
        return zlib.compress(json.dumps([self._where, self._texts]).encode())

    def _piece(self, piece: int, region: Region | None) -> str:
        whole = self._region
        if region is None or whole is None or region.ranges == whole.ranges:
            return f"piece_{piece}{self._where}"
        return f"piece_{piece}{_range(*region.ranges[0][1:])}"

    def _add(self, name: str, graph_module: torch.fx.GraphModule) -> None:
        self._texts[name] = text = graph_module.print_readable(print_output=False)
        trace_text(name, lambda: text)


def _range(least: int | None, most: int | None) -> str:
    return f"_range_{least}_{most}"


def split_text(plan: ExecutionPlan, pieces: Iterable[PieceExplanation]) -> str:
    """The graph whose operations are the pieces, and below what each of them is."""
    lines = [f"def model({', '.join(plan.inputs)}):"]
    for call in plan.calls:
        results = f"{', '.join(call.outputs)} = " if call.outputs else ""
        comment = f"  # {call.comment}" if call.comment else ""
        lines.append(f"    {results}piece_{call.piece}({', '.join(call.inputs)}){comment}")
    lines += [f"    return ({', '.join(map(str, plan.results))})", ""]
    for piece in pieces:
        told = [piece.kind, piece.module_path, piece.why, f"{piece.num_ops} operations"]
        if piece.same_as is not None:
            told.append(f"the same as piece {piece.same_as}")
        if piece.differs_from:
            told.append(f"differs from {piece.differs_from}")
        lines.append(f"piece {piece.index}: {'; '.join(filter(None, told))}")
    return "\n".join(lines) + "\n"


def trace_process(target: Target, config: Mapping[str, Any]) -> None:
    """Which process this is, and how it is configured."""
    trace_json("process", lambda: _process(target))
    trace_json("config", lambda: config)


def _process(target: Target) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "command": list(sys.orig_argv),
        "versions": {
            "onegraph": onegraph.version.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "transformers": importlib.metadata.version("transformers"),
        },
        "machine": f"{describe_target(target)}; {platform.platform()}",
        "started_at": round(timeline.started_at, 2),
    }


def trace_timeline() -> None:
    """The stages of the start so far."""
    trace_json("timeline", timeline.to_dict)


def _trace_constraints(entries: Sequence[ShapeEntry]) -> None:
    """Conditions on sizes, as data and where torch shows them."""
    trace_json("constraints", lambda: [entry.to_dict() for entry in entries])
    for entry in entries:
        told = f"{entry.expr}   ({entry.effect}, {entry.stage})"
        trace_constraint(told, entry.user, entry.framework, entry.source_line)


@contextlib.contextmanager
def told_why_refused() -> Iterator[None]:
    """An error of the block is shown: the conditions that cut the declared range, or why there is no one graph."""
    try:
        yield
    except OnegraphError as error:
        if isinstance(error, ConstraintError):
            _trace_constraints(error.constraints)
        if isinstance(error, CaptureError):
            log_artifact(
                "graph_breaks", functools.partial("onegraph needs one graph, and there is none:\n{}".format, error)
            )
        trace_timeline()
        raise


def trace_evaluation(status: str, why: str, num_held: int, checks: Sequence[LedgerCheck]) -> None:
    """How a recorded ledger was found in this process."""
    trace_json(
        "ledger_evaluation",
        lambda: {"held": num_held, "checks": [check.to_dict() for check in checks], "verdict": f"{status}: {why}"},
    )


def trace_build(explanation: Explanation, target: Target, store: Store | None) -> None:
    """All that is known of a finished build, but for its graphs and code."""
    trace_json("ledger", explanation.ledger.to_dict)
    _trace_constraints(explanation.ledger.shapes)
    trace_text("execution_plan", lambda: explanation.plan_source)
    trace_json("store", lambda: _store(explanation, store))
    log_artifact("guards", lambda: "\n".join(_guards(explanation)))
    trace_explanation(explanation)


def trace_explanation(explanation: Explanation) -> None:
    """What `explain` tells, with recordings as they are now."""
    trace_json("explain", explanation.to_dict)
    plan = explanation.to_dict()["plan"] if trace_is_written() else None
    if plan is not None:
        trace_json("recording_plan", lambda: plan["planned"])
        trace_json("recordings", lambda: {name: facts for name, facts in plan.items() if name != "planned"})
    trace_timeline()


def log_dims(explanation: Explanation) -> None:
    """What TORCH_LOGS=dynamic prints of a build that wasn't traced here."""
    log_dynamic(lambda: "\n".join(_dims(explanation)))


def _dims(explanation: Explanation) -> Iterator[str]:
    for dim in explanation.dims:
        yield f"{dim.name} in {dim.min}..{dim.max}: {', '.join(dim.inputs)}"
    for entry in explanation.ledger.shapes:
        yield f"{entry.effect} {entry.expr} ({entry.stage}, {entry.user or entry.framework or 'torch'})"


def _guards(explanation: Explanation) -> Iterator[str]:
    """What is checked in the place of Dynamo's guards, and when."""
    yield f"GUARDS of {explanation.model}, as onegraph checks them:"
    for dim in explanation.dims:
        yield f"| {dim.name} in {dim.min}..{dim.max}  # on every call: {', '.join(dim.inputs)}"
    for fact in explanation.ledger.inputs:
        yield f"| {fact.path}: {fact.fact} is {fact.value}  # on every call"
    when = {"call": "on every call", "event": "when its owner says so", "load": "by a process that loads it"}
    for entry in explanation.ledger.state:
        user = f", read at {entry.user}" if entry.user else ""
        yield f"| {entry.what} is {entry.value}  # {when.get(entry.checked, 'never')}{user}"


def _store(explanation: Explanation, store: Store | None) -> dict[str, Any]:
    return {
        "root": None if store is None else str(store.root),
        "index": None if explanation.index is None else explanation.index.to_dict(),
        "pieces": [
            {"index": piece.index, **_stored(one, store)}
            for piece in explanation.pieces
            if piece.same_as is None
            for one in piece.ranges
        ],
    }


def _stored(one: RangeExplanation, store: Store | None) -> dict[str, Any]:
    near = store.nearest_to(one.key) if store is not None and one.key is not None and one.store == "miss" else None
    folder = None if store is None or one.key is None else unpacked_folder(store.root, one.key)
    return {
        "range": [one.min, one.max],
        "key": one.key,
        "store": one.store,
        "why": one.why,
        "nearest": None if near is None else near.manifest.key,
        "differs": [] if near is None else [one.to_dict() for one in near.differs],
        "folder": None if folder is None else str(folder),
    }


def trace_links(explanation: Explanation, store: Store | None) -> None:
    """A link to the stored code of each piece, in tlparse's list of the compile's files.

    After the end of the compile: the page `compilation_metrics` takes all links for names of its own files.
    """
    if store is None or not trace_is_written():
        return
    for piece in explanation.pieces:
        for one in piece.ranges if piece.same_as is None else ():
            code = None if one.key is None else store.path_of(one.key, WRAPPER)
            if code is not None:
                trace_link(f"code of piece {piece.index} {piece.module_path}".rstrip(), code.absolute().as_uri())
