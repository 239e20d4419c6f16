"""`onegraph trace`: runs a model or any command under torch's structured trace, and builds a report of it."""

from __future__ import annotations

import json
import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onegraph.cli.flags import Parser, UsageError, add_model_flags, engine_config, split_compilation_words
from onegraph.env import process_variables
from onegraph.errors import TraceError

if TYPE_CHECKING:
    from onegraph.debug.traced_command import TracedRun

EXAMPLE = """example:
  onegraph trace --prompt "def " --max-tokens 20
  onegraph trace --out slow -- onegraph serve --port 8000     # Ctrl-C goes to the server
  onegraph trace -O3 --compare slow
"""


def main(words: list[str]) -> int:
    """See `onegraph trace --help`. Exit code 1 if the command failed; its trace is shown all the same."""
    ours, command = _split(words)
    options = _parsed(ours, command)
    from onegraph.debug.compare import read_facts
    from onegraph.debug.report import build_report
    from onegraph.debug.report_folder import TRACE_FOLDER, refuse_folder
    from onegraph.debug.trace_log import find_logs
    from onegraph.debug.traced_command import kept_run, run_traced

    if options.compare is not None:
        read_facts(options.compare)  # what can't be compared is told before minutes are spent
    run: TracedRun | None
    if options.source is not None:
        inside = options.source / TRACE_FOLDER
        logs = find_logs(inside if inside.is_dir() else options.source)
        folder = options.out or (options.source if inside.is_dir() else _new_folder())
        run = kept_run(options.source)
        if not logs:
            raise TraceError("there is no trace", where=str(options.source), hint="give what TORCH_TRACE wrote")
    else:
        folder = options.out or _new_folder()
        refuse_folder(folder)
        _tell(f"tracing into {folder}: {' '.join(command or ['onegraph', 'run', *_passed_on(ours)])}")
        started = command or [sys.executable, "-P", "-m", "onegraph.cli.main", "run", *_passed_on(ours)]
        run = run_traced(started, folder, output=sys.stderr if options.json else None)
        logs = find_logs(folder / TRACE_FOLDER)
        _tell(f"ended with exit code {run.exit_code} after {run.seconds:.1f} s")
    _tell(f"building the report of {_told(logs)} ...")
    facts = build_report(folder, logs, run=run, other=options.compare)
    page = (folder / "index.html").resolve()
    if options.json:
        print(json.dumps(facts, indent=1, default=str))
    else:
        print(page)
        if options.open and sys.stdout.isatty() and _has_display():
            webbrowser.open(page.as_uri())
    return 1 if run is not None and run.exit_code != 0 else 0


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our words, and the command after `--`."""
    if "--" not in words:
        return list(words), []
    at = words.index("--")
    if not words[at + 1 :]:
        raise UsageError("onegraph trace: there is no command after --")
    return list(words[:at]), list(words[at + 1 :])


def _parsed(words: list[str], command: list[str]) -> Any:
    """All words are read, also those that `onegraph run` will read again: what is wrong is told at once."""
    rest, compilation = split_compilation_words(words)
    parser = Parser(
        prog="onegraph trace",
        description="Runs `onegraph run MODEL [flags]`, or the command after `--`, under TORCH_TRACE, and builds one "
        "folder of static pages: start-up, pipeline, constraints, pieces with their code, store, recordings, config. "
        "tlparse's own report stands below it, where the extra `debug` is installed.",
        epilog=EXAMPLE,
    )
    add_model_flags(parser)
    _add_own_flags(parser)
    parser.add_argument("--prompt", action="append", help="as of `onegraph run`")
    parser.add_argument("--max-tokens", type=int, help="as of `onegraph run`")
    parser.add_argument("--temperature", type=float, help="as of `onegraph run`")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of errors")
    options = parser.parse_known_words(rest)
    engine_config(options, compilation)
    if (command or options.source is not None) and (passed := _passed_on(words)):
        what = "a command after --" if command else "--from"
        raise UsageError(f"onegraph trace: {passed[0]} is for `onegraph run`, and doesn't go with {what}")
    if command and options.source is not None:
        raise UsageError("onegraph trace: --from reads a trace that was written before, and runs no command")
    return options


def _add_own_flags(parser: Parser) -> None:
    group = parser.add_argument_group("trace")
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes (default: named by the time, here)"
    )
    group.add_argument("--compare", type=Path, metavar="OTHER", help="another report's folder: show what differs")
    group.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="DIR",
        help="run nothing: a folder that TORCH_TRACE wrote, or a report",
    )
    group.add_argument("--no-open", dest="open", action="store_false", help="don't open a browser")
    group.add_argument("--json", action="store_true", help="print the report's facts as JSON")


def _passed_on(words: Sequence[str]) -> list[str]:
    """What of our words is `onegraph run`'s."""
    own = Parser(prog="onegraph trace", add_help=False)
    _add_own_flags(own)
    spelled = (
        word.replace("_", "-", word.partition("=")[0].count("_")) if word[:2] == "--" else word for word in words
    )
    return own.parse_known_args(list(spelled))[1]


def _new_folder() -> Path:
    return Path(time.strftime("onegraph-trace-%Y%m%d-%H%M%S"))


def _told(logs: Sequence[Path]) -> str:
    num_bytes = sum(path.stat().st_size for path in logs)
    return f"{len(logs)} process{'' if len(logs) == 1 else 'es'}, {num_bytes / 2**20:.1f} MiB"


def _has_display() -> bool:
    return any(process_variables().get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _tell(text: str) -> None:
    print(f"trace: {text}", file=sys.stderr, flush=True)
