"""The engine with recordings as CUDA graphs, in every mode: its tokens, its dispatch, what is told."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from onegraph import LLM, SamplingParams
from onegraph.counters import counters
from onegraph.cudagraph.recorded_call import WholeReplay
from tests.cuda.conftest import Device

MODES = ("PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")
LIMITS: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 40, "max_num_seqs": 8, "max_num_batched_tokens": 24}
SIZES = {"cudagraph_capture_sizes": [1, 4, 8]}


def engine(folder: Path, device: Device, config: dict[str, Any]) -> LLM:
    return LLM(str(folder), device=device.name, compilation_config={"backend": "eager", **config}, **LIMITS)


def tokens(llm: LLM, seed: int = 0) -> list[list[int]]:
    """Of requests of all lengths, more than run at once."""
    rng = random.Random(seed)
    prompts = [{"prompt_token_ids": [rng.randrange(256) for _ in range(length)]} for length in (1, 2, 5, 17, 40) * 2]
    params = [SamplingParams(temperature=0, max_tokens=rng.randrange(4, 20), ignore_eos=True) for _ in prompts]
    return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, params, use_tqdm=False)]


def counted(begin: str, before: dict[str, int]) -> dict[str, int]:
    after = counters.snapshot()
    found = {name: count - before.get(name, 0) for name, count in after.items() if name.startswith(begin)}
    return {name.removeprefix(begin): count for name, count in found.items() if count}


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_plain_calls_in_every_mode(mode: str, device: Device, model_folder: Path) -> None:
    expected = tokens(engine(model_folder, device, {"cudagraph_mode": "NONE"}))
    sizes = [1, 4, 8] if mode == "FULL_DECODE_ONLY" else [1, 4, 8, 24]
    llm = engine(model_folder, device, {"cudagraph_mode": mode, "cudagraph_capture_sizes": sizes})
    before = counters.snapshot()
    assert tokens(llm) == expected
    replays, batches = counted("replays:", before), counted("batches:", before)
    assert (
        replays.keys()
        == {
            "PIECEWISE": {"PIECEWISE"},
            "FULL": {"FULL"},
            "FULL_DECODE_ONLY": {"FULL"},
            "FULL_AND_PIECEWISE": {"FULL", "PIECEWISE"},
        }[mode]
    )
    unrecorded = {"NONE:not_uniform_decode"} if mode == "FULL_DECODE_ONLY" else set()
    ways = {f"{way}:{how}" for way in replays for how in ("exact", "padded")}
    assert unrecorded <= batches.keys() <= unrecorded | ways
    assert sum(count for name, count in batches.items() if not name.startswith("NONE")) == sum(replays.values())


def test_batches_are_recorded_by_default_and_the_first_replays_compared(
    device: Device, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole ones and pieces; where a replay isn't the plain call, nothing is recorded from then on, with a note."""
    llm = engine(model_folder, device, {"backend": "inductor"})
    expected = tokens(engine(model_folder, device, {"backend": "inductor", "cudagraph_mode": "NONE"}))
    plan = llm.explain().to_dict()["plan"]
    assert plan["mode"] == "FULL_AND_PIECEWISE"
    assert [(one["num_tokens"], one["mode"]) for one in plan["sizes"]] == [
        *((size, mode) for size in (1, 2, 4, 8) for mode in ("FULL", "PIECEWISE")),
        *((size, "PIECEWISE") for size in (16, 24)),
    ]
    before = counters.snapshot()
    assert tokens(llm) == expected
    assert counted("replays:", before).keys() == {"FULL", "PIECEWISE"}
    replay = WholeReplay.__call__

    def wrong(self: WholeReplay, inputs: tuple[Any, ...]) -> Any:
        results = replay(self, inputs)
        results[0].add_(1)
        return results

    monkeypatch.setattr(WholeReplay, "__call__", wrong)
    llm = engine(model_folder, device, {"backend": "inductor"})
    assert tokens(llm) == expected
    assert any("isn't what the same call gives" in note for note in llm.explain().notes)


@pytest.mark.parametrize("mode", MODES)
def test_each_replay_equals_the_plain_call_to_the_bit(mode: str, device: Device, model_folder: Path) -> None:
    config = {"cudagraph_mode": mode, "cudagraph_debug": True, "cudagraph_check": "always", **SIZES}
    llm = engine(model_folder, device, config)
    before = counters.snapshot()
    tokens(llm, seed=1)
    assert sum(counted("replays:", before).values()) > 10


def test_sizes_are_recorded_from_the_largest_in_one_pool_and_told(device: Device, model_folder: Path) -> None:
    llm = engine(model_folder, device, {"cudagraph_mode": "FULL_AND_PIECEWISE", **SIZES})
    plan = llm.explain().to_dict()["plan"]
    assert {(one["num_tokens"], one["mode"]) for one in plan["sizes"]} == {
        (size, mode) for size in (1, 4, 8) for mode in ("FULL", "PIECEWISE")
    }
    ids = [shapes for shapes in device.recorded if (264, 32) in shapes]  # what embeds tokens
    lengths = [[shape[0] for shape in shapes if len(shape) == 1 and shape[0] in (1, 4, 8)] for shapes in ids]
    for found in lengths:
        found.remove(4)  # the frequencies of rotary embeddings
    sizes = [max(found) for found in lengths]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert len({one["pool"] for one in device.cuda.captures}) == 1
    assert all(not one["gc"] for one in device.cuda.captures)


def test_lazy_recordings_are_made_when_a_size_first_comes(device: Device, model_folder: Path) -> None:
    llm = engine(model_folder, device, {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_lazy": True, **SIZES})
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    assert device.cuda.captures == []
    with counters.expect(**{"recordings:FULL": 1, "replays:FULL": 5}):
        llm.generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)
    assert len(device.cuda.captures) == 1


@pytest.mark.parametrize("mode", ["FULL", "FULL_DECODE_ONLY"])
def test_an_uncompiled_model_is_recorded_whole(mode: str, device: Device, model_folder: Path) -> None:
    expected = tokens(LLM(str(model_folder), device=device.name, enforce_eager=True, **LIMITS))
    llm = engine(model_folder, device, {"mode": 0, "cudagraph_mode": mode, "cudagraph_debug": True, **SIZES})
    before = counters.snapshot()
    assert tokens(llm) == expected
    assert counted("replays:", before).get("FULL", 0) > 10
    assert not counted("dynamo_compiles", before) and not counted("unrecorded_calls:other_arguments", before)
    explained = llm.explain().to_dict()
    names = {use["name"] for use in explained["plan"]["memory"]}
    assert "kv_caches[0][0]" in names and "model.model.embed_tokens.weight" in names
    assert explained["config"]["mode"]["value"] == "NONE" and explained["pieces"] == []
