"""The engine with recordings: the same tokens in every mode, padding that reaches nothing, and what is told of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from onegraph import LLM, SamplingParams
from onegraph.counters import counters
from onegraph.engine.recorded_batches import PADDING
from onegraph.engine.runner import Runner, StepLogits
from onegraph.engine.startup import WORTH_RECORDING
from onegraph.errors import ConfigError, RecordingError
from onegraph.ir.recording import NotRecordableError
from onegraph.targets.cpu.tape import TapeRecorder, TapeRecording
from tests.llm.tiny_llama import MAX_LEN

MODES = ("PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
LIMITS: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 40, "max_num_seqs": 8, "max_num_batched_tokens": 24}


def recorded(folder: Path, mode: str, **fields: Any) -> LLM:
    """Pieces run op by op: recordings are the same for all backends, and this one needs no compiler."""
    config = {"backend": "eager", "cudagraph_mode": mode, **fields}
    return LLM(str(folder), compilation_config=config, **LIMITS)


@pytest.fixture(scope="module")
def plain(model_folder: Path) -> LLM:
    return LLM(str(model_folder), compilation_config={"backend": "eager", "cudagraph_mode": "NONE"}, **LIMITS)


def steps(llm: LLM, number: int, seed: int) -> Iterator[None]:
    """So many steps of an engine that requests come to, are served by, and are taken away from, at random."""
    rng, engine, names = random.Random(seed), llm.engine, 0
    for _ in range(number):
        while not engine.has_unfinished() or rng.random() < 0.3:
            length, names = rng.choice([1, 2, 5, 17, 40]), names + 1
            prompt = [rng.randrange(256) for _ in range(length)]
            params = SamplingParams(temperature=0, max_tokens=rng.randrange(1, 20), ignore_eos=True)
            engine.add_request(f"request {names}", prompt, params)
        if rng.random() < 0.1:
            engine.abort(f"request {rng.randrange(1, names + 1)}")
        if engine.has_unfinished():
            engine.step()
            yield


@pytest.mark.parametrize("mode", MODES)
def test_a_replay_equals_the_plain_call_on_the_same_batch(mode: str, model_folder: Path) -> None:
    """`cudagraph_debug` compares each replay with the plan's function, on the same memory, to the bit."""
    llm = recorded(model_folder, mode, cudagraph_debug=True, cudagraph_check="always")
    before = counters.snapshot()
    assert sum(1 for _ in steps(llm, 500, seed=1)) >= 490
    after = counters.snapshot()
    replays = {name: count - before.get(name, 0) for name, count in after.items() if name.startswith("replays:")}
    assert sum(replays.values()) > 150, replays


@pytest.mark.parametrize("mode", MODES)
def test_logits_equal_those_of_batches_without_padding(
    mode: str, model_folder: Path, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[torch.Tensor]] = {}
    run = Runner.run

    def watched(self: Runner, batch: Any) -> StepLogits:
        found = run(self, batch)
        seen.setdefault(id(self), []).append(found.logits.clone())
        return found

    monkeypatch.setattr(Runner, "run", watched)
    llm = recorded(model_folder, mode)
    before = counters.snapshot()
    for one in (plain, llm):
        one.engine.reset()
        for _ in steps(one, 500, seed=2):
            pass
        one.engine.reset()
    after = counters.snapshot()
    assert sum(count - before.get(name, 0) for name, count in after.items() if name.startswith("replays:")) > 100
    unpadded, padded = seen.values()
    assert len(unpadded) == len(padded)
    for expected, found in zip(unpadded, padded, strict=True):
        assert expected.shape == found.shape
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_padding_is_written_nowhere_and_read_nowhere(model_folder: Path) -> None:
    """Blocks that nobody holds keep what they have, and their NaN reaches no logits."""
    llm = recorded(model_folder, "FULL_DECODE_ONLY", cudagraph_capture_sizes=[8])
    caches = llm.engine._runner._kv_caches
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [9]}]
    want = [one.outputs[0].token_ids for one in llm.generate(prompts, params, use_tqdm=False)]
    llm.engine.reset()
    with torch.inference_mode():
        for pair in caches:
            for cache in pair:
                cache.fill_(float("nan"))
    with counters.expect(**{"batches:FULL:padded": 7}):
        got = [one.outputs[0].token_ids for one in llm.generate(prompts, params, use_tqdm=False)]
    assert got == want
    written = {int(block) for block in caches[0][0].isfinite().flatten(1).any(1).nonzero()}
    assert len(written) == 2


@pytest.mark.parametrize("mode", ["FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_what_lies_in_the_buffers_reaches_nothing(
    mode: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each step the rest of the input buffers has token ids that there aren't, and slots of blocks in use."""
    llm = recorded(model_folder, mode, cudagraph_capture_sizes=[8])
    runner, caches = llm.engine._runner, [cache for pair in llm.engine._runner._kv_caches for cache in pair]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = [{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [9]}, {"prompt_token_ids": list(range(30))}]
    want = [one.outputs[0].token_ids for one in llm.generate(prompts, params, use_tqdm=False)]
    llm.engine.reset()
    run, steps = Runner.run, 0

    def poisoned(self: Runner, batch: Any) -> StepLogits:
        nonlocal steps
        numbers = {"_input_ids": 10**6, "_positions": 10**6, "_seq_lens": 10**6, "_block_tables": 10**6}
        with torch.inference_mode():
            for name in ("_query_start_loc", "_logits_indices", *numbers):
                getattr(self, name)._tensor.fill_(numbers.get(name, 10**6))
            self._slot_mapping._tensor.copy_(torch.arange(len(self._slot_mapping._tensor)))
            before = [cache.clone() for cache in caches]
        found = run(self, batch)
        size = runner._block_size
        tables = {one.sequence.row: self._tables.array[one.sequence.row] for one in batch.scheduled}
        written = {
            int(tables[one.sequence.row][place // size]) * size + place % size
            for one in batch.scheduled
            for first in (one.sequence.num_computed_tokens,)
            for place in range(first, first + one.num_new_tokens)
        }
        for cache, was in zip(caches, before, strict=True):
            rows, old = (one.reshape(-1, *one.shape[2:]) for one in (cache, was))
            changed = {int(row) for row in (rows != old).flatten(1).any(1).nonzero()}
            assert changed <= written
        steps += 1
        return found

    monkeypatch.setattr(Runner, "run", poisoned)
    before = counters.snapshot().get("padding_rows:FULL", 0)
    got = [one.outputs[0].token_ids for one in llm.generate(prompts, params, use_tqdm=False)]
    assert got == want and steps >= 8
    assert counters.snapshot()["padding_rows:FULL"] >= before + 5 * 6


def test_each_input_has_a_policy_and_it_is_told(model_folder: Path) -> None:
    plan = recorded(model_folder, "FULL_DECODE_ONLY").explain().to_dict()["plan"]
    buffers = {one["name"]: one["padding"] for one in plan["buffers"]}
    assert buffers == dict(PADDING)
    assert {"range": [5, 7], "size": 8, "mode": "FULL", "share": 0.25} in plan["padded"]
    plan = recorded(model_folder, "PIECEWISE", cudagraph_capture_sizes=[4]).explain().to_dict()["plan"]
    buffers = {one["name"]: one["padding"] for one in plan["buffers"]}
    assert buffers["slot_mapping"] == -1 and buffers["query_start_loc"] is None


def test_an_engine_has_policies_of_its_own(model_folder: Path) -> None:
    with counters.expect(graphs_captured=0), pytest.raises(ConfigError, match="is for library calls"):
        recorded(model_folder, "FULL", cudagraph_padding={"input_ids": "zero"})


def test_lazy_recordings_are_made_when_a_size_first_comes(model_folder: Path) -> None:
    llm = recorded(model_folder, "FULL_DECODE_ONLY", cudagraph_lazy=True, cudagraph_capture_sizes=[1, 4])
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    assert llm.explain().to_dict()["plan"]["sizes"] == []
    with counters.expect(**{"recordings:FULL": 1, "replays:FULL": 5}):
        llm.generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)
    with counters.expect(**{"recordings:FULL": 0, "replays:FULL": 5}):
        llm.generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)
    assert [one["num_tokens"] for one in llm.explain().to_dict()["plan"]["sizes"]] == [1]


def test_what_is_recorded_is_told(model_folder: Path) -> None:
    llm = recorded(model_folder, "FULL_DECODE_ONLY")
    plan = llm.explain().to_dict()["plan"]
    assert plan["mode"] == "FULL_DECODE_ONLY"
    assert [(one["num_tokens"], one["mode"]) for one in plan["sizes"]] == [(s, "FULL") for s in (1, 2, 4, 8)]
    assert {"range": [9, 24], "why": "more tokens than the largest recorded batch"} in plan["uncovered"]
    assert any("new tokens" in one["why"] for one in plan["uncovered"])
    names = {use["name"] for use in plan["memory"]}
    assert "kv_caches[0][0]" in names and any("weight" in name for name in names)


def test_a_size_that_no_batch_has_is_refused(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cudagraph_capture_sizes has 9, and sizes are 1\.\.8"):
        recorded(model_folder, "FULL_DECODE_ONLY", cudagraph_capture_sizes=[9])


def test_long_texts_grow_into_their_block_tables(model_folder: Path, plain: LLM) -> None:
    llm = recorded(model_folder, "FULL_DECODE_ONLY")
    params = SamplingParams(temperature=0, max_tokens=MAX_LEN, ignore_eos=True)
    prompts = [{"prompt_token_ids": [1]}, {"prompt_token_ids": list(range(60))}]
    before = counters.snapshot().get("replays:FULL", 0)
    got, want = (
        [one.outputs[0].token_ids for one in each.generate(prompts, params, use_tqdm=False)] for each in (llm, plain)
    )
    assert got == want
    assert counters.snapshot()["replays:FULL"] > before + 60


GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [7]}, {"prompt_token_ids": [9, 9]}]


def tokens(llm: LLM, prompts: list[Any] = PROMPTS) -> list[tuple[int, ...]]:
    return [tuple(one.outputs[0].token_ids) for one in llm.generate(prompts, GREEDY, use_tqdm=False)]


def test_small_decode_batches_are_recorded_by_default(model_folder: Path, plain: LLM) -> None:
    """Each size when it has come often enough, so that a start takes no longer, and a rare batch neither."""
    llm = LLM(str(model_folder), **LIMITS)
    explained = llm.explain().to_dict()
    assert explained["config"]["cudagraph_mode"] == {"value": "FULL_DECODE_ONLY", "why": "device rule: cpu"}
    planned = explained["plan"]["planned"]
    assert planned["sizes"] == {"FULL": [1, 2, 3, 4, 5, 6, 7, 8]} and planned["lazily_at"] == WORTH_RECORDING
    assert explained["plan"]["sizes"] == []
    assert f"records   FULL at 1..8 (by default), each when it comes for the {WORTH_RECORDING}th time" in llm.summary()
    for number in (5, 10):
        recordings = {"recordings:FULL": int(number == 10), "replays:FULL": max(number - WORTH_RECORDING + 1, 0)}
        with counters.expect(**recordings, **{"batches:FULL:padded": 0}):
            assert tokens(llm) == tokens(plain)
    plan = llm.explain().to_dict()["plan"]
    assert [one["num_tokens"] for one in plan["sizes"]] == [3]
    assert plan["planned"]["traffic"] == {"3": 10} and plan["planned"]["padding"]["FULL"]["of_traffic"] == 0


def test_what_cant_be_recorded_is_an_error_where_it_was_asked_for_alone(
    model_folder: Path, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> Any:
        raise NotRecordableError("unsafe_op", "planted", "can't be recorded")

    monkeypatch.setattr(TapeRecorder, "record", refuses)
    llm = LLM(str(model_folder), **LIMITS)
    with counters.expect(**{"engines_without_recordings": 1, "batches:NONE:not_recordable": 2}):
        assert tokens(llm) == tokens(plain) and tokens(llm) == tokens(plain)
    explained = llm.explain()
    assert any("nothing is recorded: FULL at size 3 can't be recorded" in note for note in explained.notes)
    assert explained.to_dict()["plan"]["planned"] is None
    with pytest.raises(RecordingError, match="planted"):
        recorded(model_folder, "FULL_DECODE_ONLY")


def test_what_can_t_be_recorded_again_runs_as_ever(
    model_folder: Path, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory moves under a recording that nobody asked for, and then nothing can be recorded."""
    llm = LLM(str(model_folder), **LIMITS)
    for _ in range(2):
        tokens(llm)
    module = llm.engine._runner._model.original
    name, weight = next(iter(module.named_parameters()))
    weight.data = weight.data.clone()

    def refuses(*_: Any) -> Any:
        raise NotRecordableError("unsafe_op", "planted", "can't be recorded")

    monkeypatch.setattr(TapeRecorder, "record", refuses)
    with counters.expect(**{"engines_without_recordings": 1, "replays:FULL": 0}):
        assert tokens(llm) == tokens(plain), name
    assert any("planted" in note for note in llm.explain().notes)


def test_a_first_replay_that_gives_something_else_ends_what_nobody_asked_for(
    model_folder: Path, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(str(model_folder), **LIMITS)
    tokens(llm)
    monkeypatch.setattr(TapeRecording, "replay", lambda self: None)
    with counters.expect(engines_without_recordings=1):
        for _ in range(2):
            assert tokens(llm) == tokens(plain)
    assert any("isn't what the same call gives" in note for note in llm.explain().notes)


def test_sizes_are_chosen_for_traffic_and_memory(model_folder: Path) -> None:
    llm = recorded(model_folder, "FULL_DECODE_ONLY", cudagraph_traffic={1: 900, "3": 60, "7": 1})
    plan = llm.explain().to_dict()["plan"]
    assert [one["num_tokens"] for one in plan["sizes"]] == [1, 3, 7]
    assert plan["planned"]["chosen"] == "chosen by traffic"
    all_bytes, expected = sum(one["bytes"] for one in plan["sizes"]), plan["planned"]["expected_bytes"]
    assert all_bytes <= expected <= 20 * all_bytes and plan["planned"]["expected_seconds"] > 0
    tight = recorded(model_folder, "FULL_DECODE_ONLY", cudagraph_memory_mib=1, cudagraph_traffic={"1": 5, "8": 1})
    assert [one["num_tokens"] for one in tight.explain().to_dict()["plan"]["sizes"]] == [1, 8]
    with pytest.raises(ConfigError, match=r"cudagraph_capture_sizes=\[1\] \(user\) gives the sizes that"):
        recorded(model_folder, "FULL", cudagraph_capture_sizes=[1], cudagraph_memory_mib=1)


def test_an_engine_whose_module_changes_records_again(model_folder: Path, plain: LLM) -> None:
    llm = recorded(model_folder, "FULL_DECODE_ONLY", cudagraph_lazy=True)
    with counters.expect(**{"recordings:FULL": 1, "replays:FULL": 5}):
        before = tokens(llm)
    module = llm.engine._runner._model.original
    with torch.no_grad():
        first = next(iter(module.named_parameters()))[0]
        module.get_parameter(first).mul_(0.5)
    module.train(not module.training)  # captured state: it is captured anew when the engine is idle
    with counters.expect(**{"recordings:FULL": 1, "replays:FULL": 5}):
        tokens(llm)
    assert before == tokens(plain)


def test_sizes_that_a_region_has_alone(model_folder: Path, plain: LLM) -> None:
    llm = recorded(model_folder, "FULL_DECODE_ONLY", dynamic_shapes="backed", cudagraph_capture_sizes=[1])
    with counters.expect(**{"replays:FULL": 5}):
        assert tokens(llm, PROMPTS[:1]) == tokens(plain, PROMPTS[:1])


def test_a_check_that_was_asked_for_is_an_error_where_it_fails(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mode is the default's, and the check isn't: a replay that gives something else ends the request."""
    llm = LLM(str(model_folder), compilation_config={"cudagraph_debug": True}, **LIMITS)
    for _ in range(2):
        tokens(llm)
    monkeypatch.setattr(TapeRecording, "replay", lambda self: None)
    with pytest.raises(RecordingError):
        tokens(llm)
