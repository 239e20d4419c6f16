"""LLM and the ledger: it owns its module and compares state between requests; a batch out of range runs eager."""

from pathlib import Path
from typing import Any

import pytest
from torch.export import Dim

from onegraph import LLM, SamplingParams
from onegraph.counters import counters
from onegraph.errors import ConfigError, StateChangedError
from onegraph.models.flat_model import FlatModel

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
EAGER = {"backend": "eager"}


def generated(llm: LLM, prompt: str = "def f(x):") -> list[int]:
    return list(llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids)


def started(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), dtype="float32", num_kv_blocks=64, **options)


def test_a_batch_outside_the_range_runs_uncompiled_with_a_reason(
    model_folder: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = FlatModel.dynamic_shapes

    def narrow(*limits: int) -> dict[str, Any]:
        num_tokens = Dim("num_tokens", min=1, max=16)
        return {**declared(*limits), **{name: {0: num_tokens} for name in ("input_ids", "positions", "slot_mapping")}}

    monkeypatch.setattr(FlatModel, "dynamic_shapes", staticmethod(narrow))
    compiled = started(model_folder, compilation_config=EAGER)
    with counters.expect(**{"eager_batches:OG-RANGE": 1}):
        assert generated(compiled, "x" * 20) == generated(llm, "x" * 20)


def test_state_is_compared_between_requests_and_captured_once_more(model_folder: Path) -> None:
    compiled, eager = started(model_folder, compilation_config=EAGER), started(model_folder, enforce_eager=True)
    before = generated(compiled)
    with counters.expect(recaptures=0):
        assert generated(compiled) == before
    for llm in (compiled, eager):
        llm._started.model.module.model.model.layers[0].self_attn.scaling = 5.0
        llm._started.model.module.model.model.norm.variance_epsilon = 10.0
    with counters.expect(recaptures=1):
        after = generated(compiled, "something else")
    assert after == generated(eager, "something else")
    assert {entry["checked"] for entry in compiled.explain().to_dict()["ledger"]["state"]} == {"event"}
    assert "while requests are running" in str(compiled.explain())


def test_changed_state_is_an_error_where_that_is_asked_for(model_folder: Path) -> None:
    compiled = started(model_folder, compilation_config={**EAGER, "on_state_change": "error"})
    before = generated(compiled)
    layer = compiled._started.model.module.model.model.layers[0]
    scaling, layer.self_attn.scaling = layer.self_attn.scaling, 5.0
    with pytest.raises(StateChangedError, match="scaling"):
        generated(compiled)
    layer.self_attn.scaling = scaling
    assert generated(compiled) == before


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_model_is_checked_at_batch_sizes(model_folder: Path, backend: str) -> None:
    compiled = started(model_folder, compilation_config={"backend": backend}, max_num_batched_tokens=64)
    before = generated(compiled)
    checks = compiled.check(6)
    assert [check.num_tokens for check in checks][:2] == [1, 2] and checks[-1].num_tokens == 64
    assert all(check.ok for check in checks), [check.found for check in checks]
    assert compiled.explain().to_dict()["check"][0]["ok"] is True
    assert generated(compiled) == before


def test_what_is_not_compiled_can_not_be_checked(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="nothing is compiled"):
        llm.check()


def test_a_trace_of_a_model_could_be_taken_by_another_process(model_folder: Path) -> None:
    compiled = started(model_folder, compilation_config=EAGER)
    generated(compiled)
    ledger = compiled.explain().ledger
    assert ledger.unindexable == ()
    assert {"flat_model.py", "modeling_llama.py"} <= {Path(source.path).name for source in ledger.sources}
    assert all(source.holds() for source in ledger.sources)


@pytest.mark.parametrize("num_kv_blocks", [65, 2, 1])
def test_another_size_of_the_kv_cache_is_no_other_model(num_kv_blocks: int, model_folder: Path) -> None:
    """It follows the memory that a process finds free, and with few blocks the engine's texts are shorter."""
    first = started(model_folder, compilation_config=EAGER)
    second = LLM(str(model_folder), dtype="float32", num_kv_blocks=num_kv_blocks, compilation_config=EAGER)
    index = second.explain().index
    assert index is not None and index.status == "hit", index
    assert generated(first, "d") == generated(second, "d")


def test_a_model_whose_sizes_are_traced_at_samples(model_folder: Path, llm: LLM) -> None:
    traced = {**EAGER, "dynamic_shapes": "backed"}
    compiled = started(model_folder, compilation_config=traced, max_num_seqs=1, max_num_batched_tokens=64)
    assert generated(compiled) == generated(llm)
