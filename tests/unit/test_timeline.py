"""The stages of a process since it began."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from onegraph.timeline import MAX_EVENTS, Timeline, process_age_s


def test_the_age_is_that_of_the_process() -> None:
    program = (
        "import time; time.sleep(0.5); from onegraph.timeline import *; print(process_age_s(), timeline.to_dict())"
    )
    began = time.time()
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    age, _, facts = told.partition(" ")
    assert 0.5 <= float(age) <= time.time() - began + 0.02
    assert "'name': 'import', 'start_s': " in facts and "before onegraph" in facts
    assert process_age_s() > 0.1


def test_stages_and_moments() -> None:
    timeline = Timeline(10)
    with pytest.raises(KeyError), timeline.stage("capture", "a model"):
        raise KeyError
    timeline.is_ready()
    assert timeline.has_first_token() and not timeline.has_first_token()
    ready = timeline.ready_s
    timeline.is_ready()  # of another model, later
    assert timeline.ready_s == ready is not None and timeline.first_token_s is not None
    facts = timeline.to_dict()
    assert [event["name"] for event in facts["events"]] == ["capture", "first token"]
    assert facts["events"][0]["detail"] == "a model" and 10 <= facts["events"][0]["start_s"] < 11
    assert 10 <= facts["ready_s"] <= facts["first_token_s"] < 11


def test_an_import_is_a_stage_where_it_is_new() -> None:
    timeline = Timeline(0)
    sys.modules.pop("colorsys", None)
    for _ in range(2):
        timeline.imports("colorsys", "colours")
    assert [event["detail"] for event in timeline.to_dict()["events"]] == ["colours"]
    for _ in range(MAX_EVENTS + 1):
        timeline.add("piece 0", time.perf_counter(), 0)
    assert len(timeline.to_dict()["events"]) == MAX_EVENTS
