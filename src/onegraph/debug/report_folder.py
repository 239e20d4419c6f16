"""The folder of a report: what stands in it beside the pages, and which folder mustn't become one."""

from __future__ import annotations

from pathlib import Path

from onegraph.debug.compare import FACTS_FILE, read_facts
from onegraph.errors import TraceError

TRACE_FOLDER = "trace"
"""What torch wrote."""
RUN_FILE = "run.json"
"""The command that was traced."""
_HINT = "give --out a new folder, or one that a report was built in"


def refuse_folder(folder: Path) -> None:
    """Raises TraceError for a folder that has other things than a report's, which would be written over."""
    try:
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise unwritable(folder, error) from error
    if FACTS_FILE in names:
        read_facts(folder)  # of a report, or an error
        return
    foreign = sorted(names - {TRACE_FOLDER, RUN_FILE})
    if foreign:
        raise TraceError(f"the folder has other things in it, such as {foreign[0]}", where=str(folder), hint=_HINT)


def unwritable(folder: Path, error: OSError) -> TraceError:
    """What is told of a folder that doesn't take a report."""
    told = f"the report can't be written: {error.strerror or error}"
    return TraceError(told, where=str(error.filename or folder), hint="give another folder with --out")
