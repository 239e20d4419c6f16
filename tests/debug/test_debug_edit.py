"""`onegraph debug edit`: the folder with a piece's code, who shares it, what was edited, and how it is run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onegraph.cli.main import main
from tests.debug.conftest import WORDS, Edit

pytestmark = pytest.mark.usefixtures("in_root")


def test_it_unpacks_tells_and_what_it_tells_to_run_works(
    root: Path, edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["debug", "edit", "4", *WORDS, "-O.cudagraph_mode=NONE"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    folder, told = Path(first), {line.split()[0]: line.partition(" ")[2].strip() for line in lines}
    assert folder.parent == root / "unpacked" and folder.name == f"piece_2-{told['artifact'][:16]}"
    assert {"wrapper.py", "kernels.cpp", "graph.py"} <= set(told)
    assert told["shared"].startswith("by pieces 2, 4, 6") and told["edited"] == "nothing yet"
    flags = [*WORDS, "-O.cudagraph_mode=NONE"]
    assert sorted(shlex.split(told["try"])) == sorted(["onegraph", "debug", "run", "4", *flags])
    assert sorted(shlex.split(told["use"])) == sorted(
        ["onegraph", "run", *flags, "-O.compile_cache_save_format=unpacked"]
    )
    edit(folder, "wrapper.py", "        args.clear()\n", "        print('the edit')\n        args.clear()\n")
    used = subprocess.run(
        [sys.executable, "-m", "onegraph.cli.main", *shlex.split(told["use"])[1:], "--prompt=a", "--max-tokens=1"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert used.returncode == 0 and used.stdout.count("the edit") == 3, used.stdout + used.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["3"], "piece 3 has no unpacked folder: eager, a splitting op runs as it is"),
        (["2", "-O.compile_cache_save_format=binary"], "what isn't unpacked can't be edited"),
    ],
)
def test_what_has_no_code_to_edit_is_refused(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["debug", "edit", *words, *WORDS]) == 2
    assert told in capsys.readouterr().err


def test_without_the_compile_cache_there_is_nothing_to_edit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONEGRAPH_DISABLE_COMPILE_CACHE", "1")
    assert main(["debug", "edit", "2", *WORDS]) == 2
    assert "contradicts ONEGRAPH_DISABLE_COMPILE_CACHE=1" in capsys.readouterr().err


def test_debug_needs_a_verb_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["debug"]) == 2
    assert "which verb? run, edit" in capsys.readouterr().err
    assert main(["debug", "edti", "2"]) == 2
    assert "did you mean 'edit'?" in capsys.readouterr().err
