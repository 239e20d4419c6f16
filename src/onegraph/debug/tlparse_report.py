"""tlparse's own report of a trace file, below ours; where tlparse isn't installed, the words that say how to get it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_MOST_S = 300


@dataclass(frozen=True)
class TlparseReport:
    """Its page, or why there is none."""

    page: Path | None
    why: str


def render_with_tlparse(log: Path, folder: Path) -> TlparseReport:
    """Renders a log into the folder, which is made anew."""
    program = _tlparse()
    if program is None:
        return TlparseReport(None, "tlparse isn't installed: pip install 'onegraph[debug]', then onegraph trace --from")
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [program, str(log), "-o", str(folder), "--overwrite", "--no-browser"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_MOST_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return TlparseReport(None, f"tlparse failed: {error}")
    if done.returncode != 0 or not (folder / "index.html").exists():
        told = (done.stderr or done.stdout).strip().splitlines()
        return TlparseReport(None, f"tlparse ended with exit code {done.returncode}: {told[-1] if told else 'no word'}")
    return TlparseReport(folder / "index.html", "")


def _tlparse() -> str | None:
    """The program: of this Python's environment, or else of the PATH."""
    beside = Path(sys.executable).parent / "tlparse"
    return str(beside) if beside.exists() else shutil.which("tlparse")
