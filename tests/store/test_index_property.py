"""The property of the index: what a later process takes from it is right, and what is right is taken.

A drawn program runs with an empty cache; the same program, made anew, then runs with what was kept; and once more with
its state changed at other moments. Each call must equal eager, as in the property of capture, whose programs these are.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from random import Random

import pytest
from torch._dynamo import symbolic_convert

from onegraph.counters import counters
from tests.pipeline.drawn_models import Case, draw_case
from tests.pipeline.test_capture_property import PropertyError, run_case

NUM_CASES, NUM_INDUCTOR_CASES = 150, 10
"""Each runs three times: 300 of the runs find what an earlier one left."""


def with_other_changes(case: Case) -> Case:
    """The same program with the changes of its calls in another order, and some before the first one."""
    r = Random(case.seed)
    changes = [call.changes for call in case.calls]
    r.shuffle(changes)
    calls = tuple(dataclasses.replace(call, changes=given) for call, given in zip(case.calls, changes, strict=True))
    return dataclasses.replace(case, calls=calls)


@dataclasses.dataclass
class Found:
    """Over all cases: builds taken from the index, those that were traced again, and cases that can't be kept."""

    hits: int = 0
    needless: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    unkept: int = 0


def looked_up() -> tuple[int, int, int]:
    seen = counters.snapshot()
    return seen.get("index_hits", 0), seen.get("index_misses", 0), seen.get("traces_kept", 0)


def run(seed: int, backend: str, folder: Path, found: Found) -> None:
    case = draw_case(seed, max_parts=3)
    before = looked_up()
    run_case(case, new_folder(folder), backend)
    _, builds, kept = (now - then for now, then in zip(looked_up(), before, strict=True))
    before = looked_up()
    run_case(case, new_folder(folder), backend)
    hits, misses, _ = (now - then for now, then in zip(looked_up(), before, strict=True))
    found.hits += hits
    found.unkept += builds - kept
    if kept == builds and misses:
        found.needless.append(f"seed {seed}: {misses} of {hits + misses} builds were made again")
    before = looked_up()
    run_case(with_other_changes(case), new_folder(folder), backend)
    found.hits += looked_up()[0] - before[0]


def new_folder(folder: Path) -> Path:
    """An empty one, so that the program's file has the same name each time."""
    symbolic_convert._import_module.cache_clear()  # a process has one module of a name, and torch keeps it
    for module in list(sys.modules.values()):
        for name in [name for name in vars(module) if name.startswith("__import_drawn")]:
            delattr(module, name)
    shutil.rmtree(folder / "program", ignore_errors=True)
    (folder / "program").mkdir()
    return folder / "program"


def run_all(seeds: range, backend: str, folder: Path) -> Found:
    found = Found()
    for seed in seeds:
        try:
            run(seed, backend, folder, found)
        except PropertyError as error:
            found.wrong.append(f"seed {seed}: {error}")
    print(f"{found.hits} builds came from the index, {found.unkept} couldn't be kept")
    return found


@pytest.mark.parametrize("part", range(3))
def test_what_the_index_gives_is_right_and_what_is_right_is_given(part: int, tmp_path: Path, fresh_cache: Path) -> None:
    count = NUM_CASES // 3
    found = run_all(range(part * count, (part + 1) * count), "eager", tmp_path)
    assert not found.wrong and not found.needless, "\n".join([*found.wrong, *found.needless])
    assert found.hits > count


def test_the_same_with_inductor(tmp_path: Path, fresh_cache: Path) -> None:
    found = run_all(range(70_000, 70_000 + NUM_INDUCTOR_CASES), "inductor", tmp_path)
    assert not found.wrong and not found.needless, "\n".join([*found.wrong, *found.needless])


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_ten_times_as_many(tmp_path: Path, fresh_cache: Path) -> None:
    found = run_all(range(100_000, 100_000 + 10 * NUM_CASES), "eager", tmp_path)
    assert not found.wrong and not found.needless, "\n".join([*found.wrong, *found.needless])
