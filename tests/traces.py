"""Traces in tests: what torch wrote into a file of TORCH_TRACE, and what tlparse makes of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def entries(log: Path) -> dict[str, Any]:
    """onegraph's entries by their names without `onegraph_`, JSON ones read; the last of each name."""
    found: dict[str, Any] = {}
    payload: list[str] = []
    for line in reversed(log.read_text().splitlines()):
        if line.startswith("\t"):
            payload.insert(0, line[1:])
            continue
        facts = json.loads(line[line.index("] {") + 2 :])
        name = facts.get("artifact", {}).get("name", "")
        if name.startswith("onegraph_"):
            text = "\n".join(payload)
            is_json = facts["artifact"]["encoding"] == "json"
            found.setdefault(name.removeprefix("onegraph_"), json.loads(text) if is_json else text)
        payload = []
    return found


def rendered(log: Path, report: Path) -> dict[str, str]:
    """What `tlparse LOG -o REPORT` writes, by name without a number at its end; it must find nothing wrong."""
    tlparse = Path(sys.executable).parent / "tlparse"
    command = [str(tlparse), str(log), "-o", str(report), "--no-browser"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    told = result.stdout + result.stderr
    assert result.returncode == 0, told
    assert not re.search(r"fail|error|conflict", told, re.IGNORECASE), told
    assert "Stats { ok: " in told, told
    found: dict[str, str] = {}
    for path in sorted(path for path in report.rglob("*.*") if path.is_file()):
        name = re.sub(r"(_\d+)?\.\w+$", "", path.name)
        found[name] = found.get(name, "") + path.read_text()
    return found
