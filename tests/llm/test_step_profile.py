"""The step profile of an engine, cold and warm: consistent sums, kernels with their nodes, the same tokens."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from onegraph import LLM, SamplingParams
from onegraph.engine.step_profile import StepProfiler
from onegraph.ir.step_profile import StepProfile

PROMPTS: list[Any] = ["hello", "a longer prompt", "x"]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@dataclass
class Profiled:
    """An LLM, with the profile of generating for PROMPTS, and the tokens with and without it."""

    llm: LLM
    profile: StepProfile
    plain: list[list[int]]
    profiled: list[list[int]]

    @classmethod
    def of(cls, folder: Path, **fields: Any) -> Profiled:
        config = {"cudagraph_mode": "NONE", **fields}
        llm = LLM(str(folder), dtype="float32", num_kv_blocks=256, max_num_seqs=8, compilation_config=config)
        plain = generated(llm)
        with StepProfiler(llm.engine) as profiler:
            step = llm.engine.step

            def timed() -> Any:
                with profiler.step():
                    return step()

            llm.engine.step = timed  # type: ignore[method-assign]
            profiled = generated(llm)
            del llm.engine.step
        return cls(llm, profiler.profile(), plain, profiled)

    @property
    def seconds(self) -> dict[tuple[str, ...], float]:
        return {row.path: row.seconds_per_step for row in self.profile.rows}


def generated(llm: LLM) -> list[list[int]]:
    return [list(one.outputs[0].token_ids) for one in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.fixture(scope="module")
def starts(model_folder: Path, session_cache_root: Path) -> dict[str, Profiled]:
    """A cold start, then a warm one."""
    shutil.rmtree(session_cache_root / "index", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEGRAPH_CACHE_ROOT", str(session_cache_root))
        found = {name: Profiled.of(model_folder) for name in ("cold", "warm")}
    indices = {name: one.llm.explain().index for name, one in found.items()}
    assert {name: index and index.status for name, index in indices.items()} == {"cold": "miss", "warm": "hit"}
    return found


@pytest.fixture(params=["cold", "warm"])
def start(request: pytest.FixtureRequest, starts: dict[str, Profiled]) -> Profiled:
    return starts[request.param]


def test_tokens_are_the_same_while_it_is_profiled(start: Profiled) -> None:
    assert start.profiled == start.plain


def test_rows_below_a_row_are_no_more_than_it_and_parts_are_most_of_the_step(start: Profiled) -> None:
    seconds = start.seconds
    for path, whole in seconds.items():
        below = sum(one for other, one in seconds.items() if other[:-1] == path)
        assert below <= whole * 1.001 + 1e-9, path
    parts = sum(one for path, one in seconds.items() if len(path) == 2)
    assert parts >= 0.5 * seconds["step",]  # a step takes a millisecond, and other work of the machine as much
    assert start.profile.seconds_per_step == pytest.approx(seconds["step",])
    assert start.profile.num_steps == sum(start.profile.batches.values()) == 12
    assert {batch.kind for batch in start.profile.batches} == {"prefill", "decode"}


def test_every_piece_has_its_kernels_with_nodes_modules_and_lines(start: Profiled) -> None:
    pieces = start.llm.explain().pieces
    names = {f"piece {one.index} ({one.module_path})" for one in pieces}
    rows = {row.path: row for row in start.profile.rows}
    assert {path[2] for path in rows if len(path) == 3 and path[1] == "model"} == names
    kernels = [row for path, row in rows.items() if len(path) == 4 and path[1] == "model"]
    called = {row.path[3].split(" ")[0] for row in kernels}
    assert {"onegraph::linear", "onegraph::paged_attention", "onegraph::rotary_write_kv_cache"} <= called
    assert any(name.startswith("cpp_fused") for name in called)
    for row in kernels:
        assert row.ops, row
        assert row.calls_per_step >= 1
        assert row.user is not None and row.user.rpartition(":")[2].isdigit(), row
    down = [row for row in kernels if row.path[3].startswith("onegraph::linear 64 to 32")]
    assert [row.module_path for row in down] == [f"model.model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]


def test_a_warm_start_tells_what_a_cold_one_does(starts: dict[str, Profiled]) -> None:
    cold, warm = (
        {(row.path, row.ops, row.user, row.module_path, row.calls_per_step) for row in one.profile.rows}
        for one in starts.values()
    )
    assert cold == warm


def test_nothing_of_it_is_left_behind(start: Profiled) -> None:
    engine = start.llm.engine
    assert not {"_prepare", "_record", "_forward", "step"} & vars(engine._runner).keys()
    assert not {"_finish", "_postprocess", "step"} & vars(engine).keys()
    (built,) = start.llm._started.compiled._traces
    for graph in built.graphs:
        assert "__enter" not in graph.run.__code__.co_names
        for piece in graph.run.__globals__["__regions"][0]:
            assert not [name for name, value in piece.source.names.items() if type(value).__name__ == "_Timed"]


def test_the_timeline_is_a_chrome_trace(start: Profiled) -> None:
    events = start.profile.perfetto()["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    for event in spans:
        assert set(event) == {"ph", "name", "ts", "dur", "pid", "tid", "args"}
        assert event["ts"] >= 0 and event["dur"] >= 0
    steps = [event for event in spans if event["name"] == "step"]
    assert len(steps) == 12
    assert all(one["ts"] + one["dur"] <= after["ts"] for one, after in itertools.pairwise(steps))
    kernel = next(event for event in spans if event["name"].startswith("onegraph::linear"))
    assert "self_attn" in kernel["args"]["module_path"] and kernel["args"]["ops"]


def test_the_table_has_equal_pieces_once(start: Profiled) -> None:
    text = str(start.profile)
    assert "and 1 like it" in text
    assert "onegraph::linear 64 to 32" in text
    assert "modeling_llama.py:" in text
    assert "timers take about" in text


def test_replays_stand_beside_the_same_batches_without_recordings(model_folder: Path) -> None:
    one = Profiled.of(model_folder, backend="eager", cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=[4])
    assert one.profiled == one.plain
    rows = {row.path: row for row in one.profile.rows}
    assert rows["replay",].calls_per_step == pytest.approx(11 / 12)
    assert rows["step", "model"].calls_per_step == 1
    pieces = [row for path, row in rows.items() if path[:2] == ("step", "model") and len(path) == 3]
    assert pieces and all(row.calls_per_step == 1 for row in pieces)
    assert one.profile.notes[0].startswith("11 of 12 steps were replays of a recording")
    real = one.profile.seconds_per_step
    assert real < rows["step",].seconds_per_step + rows["replay",].seconds_per_step
    asides = [event for event in one.profile.perfetto()["traceEvents"] if event["tid"] == 2 and event["ph"] == "X"]
    assert len(asides) == 11


def test_a_model_that_is_not_compiled_says_so(llm: LLM) -> None:
    llm.engine.add_request("one", [1, 2, 3], PARAMS)
    with StepProfiler(llm.engine) as profiler:
        while llm.engine.has_unfinished():
            with profiler.step():
                llm.engine.step()
    profile = profiler.profile()
    assert "the model isn't compiled, so nothing is seen inside of its call" in profile.notes
    assert ("step", "model") in {row.path for row in profile.rows}
