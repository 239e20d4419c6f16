"""The generated pages are what the code says now, and the docs' links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from onegraph.cli import cache, debug
from onegraph.cli.main import COMMANDS, main
from onegraph.config.compilation import FIELDS
from onegraph.env import VARIABLES

ROOT = Path(__file__).parents[2]


def test_generated_pages_are_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools/generate_docs.py"), "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_links_between_pages_lead_to_files() -> None:
    broken = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def test_how_to_debug_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/how-to-debug.md").read_text()
    helps = [name for name in COMMANDS if name not in ("cache", "debug")]
    helps += [f"cache {verb}" for verb in cache.VERBS] + [f"debug {verb}" for verb in debug.VERBS]
    flags: set[str] = set()
    for command in helps:
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        flags |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"-O\.(\w+)", text)) <= set(FIELDS)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= flags
    assert set(re.findall(r"\bONEGRAPH_\w+", text)) <= set(VARIABLES)
    named = re.findall(r"(?:`|^|; )onegraph ([a-z]+)", text, re.MULTILINE)
    assert named and set(named) <= set(COMMANDS)
    counted = set(re.findall(r"`(onegraph_\w+)`", text))
    metrics = (ROOT / "src/onegraph/serve/metrics.py").read_text()
    assert counted and all(f'"{name}"' in metrics for name in counted)
