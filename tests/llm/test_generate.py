"""LLM.generate and chat as users see them: samples, seeds, text, stops, progress, errors, interrupts."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_llama import write_model
from transformers import AutoTokenizer

from onegraph import LLM, CompilationConfig, SamplingParams
from onegraph.errors import ConfigError, ModelError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def tokens(outputs: list) -> list[list[int]]:
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


def test_a_text_a_list_and_token_ids_are_the_same_prompt(llm: LLM):
    one = llm.generate("def f", GREEDY, use_tqdm=False)
    several = llm.generate(["def f", {"prompt_token_ids": one[0].prompt_token_ids}], GREEDY, use_tqdm=False)
    assert tokens(several) == tokens(one) * 2
    assert [o.prompt for o in several] == ["def f", None]
    assert one[0].finished and one[0].outputs[0].finish_reason == "length"
    assert llm.generate([], GREEDY) == []


def test_outputs_come_in_order_each_with_its_own_parameters(llm: LLM):
    lengths = [9, 1, 5, 3]
    given = [f"prompt {n}" for n in lengths]
    outputs = llm.generate(given, [replace(GREEDY, max_tokens=n) for n in lengths], use_tqdm=False)
    assert [o.prompt for o in outputs] == given
    assert [len(t) for t in tokens(outputs)] == lengths


def test_text_is_the_decoded_tokens(llm: LLM):
    outputs = llm.generate(["ü€😀", "a"], SamplingParams(n=4, seed=3, max_tokens=30, temperature=2.0), use_tqdm=False)
    for output in outputs:
        for completion in output.outputs:
            ids = list(completion.token_ids)
            kept = ids[:-1] if completion.finish_reason == "stop" else ids
            assert completion.text == llm.get_tokenizer().decode(kept, skip_special_tokens=True)


def test_a_seeded_sample_is_the_same_alone_and_in_any_batch(llm: LLM):
    params = SamplingParams(n=3, seed=7, max_tokens=12, temperature=1.5, top_p=0.95)
    alone = tokens(llm.generate("hello", params, use_tqdm=False))
    mates = [
        SamplingParams(seed=7, temperature=0.5),
        SamplingParams(temperature=0),
        params,
        SamplingParams(top_k=3),
    ]
    together = llm.generate(["one", "two", "hello", "three"], mates, use_tqdm=False)
    assert tokens(together[2:3]) == alone
    assert len({tuple(t) for t in alone}) == 3


def test_the_llms_seed_repeats_requests_without_one(model_folder: Path):
    def draw(seed: int) -> list[list[int]]:
        llm = LLM(str(model_folder), enforce_eager=True, num_kv_blocks=64, seed=seed)
        return tokens(llm.generate(["a", "a"], SamplingParams(max_tokens=12), use_tqdm=False))

    first = draw(1)
    assert first == draw(1) != draw(2)
    assert first[0] != first[1]


def test_a_stop_string_across_token_borders(llm: LLM):
    """Only letters are allowed, one a token, so a stop string of three letters lies in three tokens."""
    letters = llm.get_tokenizer()("abcdefgh")["input_ids"]
    params = replace(GREEDY, logit_bias=dict.fromkeys(letters, 100), max_tokens=30)
    whole = llm.generate("some text", params, use_tqdm=False)[0].outputs[0]
    stop = whole.text[7:10]
    assert len(whole.text) == 30
    cut = llm.generate("some text", replace(params, stop=["zz", stop]), use_tqdm=False)[0].outputs[0]
    at = whole.text.index(stop)
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole.text[:at], "stop", stop)
    assert list(cut.token_ids) == list(whole.token_ids)[: at + 3]


def test_chat_continues_what_the_template_writes(llm: LLM):
    messages = [{"role": "user", "content": "hi"}]
    [answer] = llm.chat(messages, GREEDY, use_tqdm=False)
    assert answer.prompt == "<|bos|>user:hi\nassistant:"
    assert answer.prompt_token_ids[0] == 257 and answer.prompt_token_ids.count(257) == 1
    several = llm.chat([messages, [{"role": "user", "content": "other"}]], GREEDY, use_tqdm=False)
    assert tokens(several)[0] == tokens([answer])[0] and several[1].prompt == "<|bos|>user:other\nassistant:"
    with pytest.raises(ConfigError, match="unknown role wizard"):
        llm.chat([{"role": "wizard", "content": "hi"}], GREEDY)
    with pytest.raises(ConfigError, match="no messages"):
        llm.chat([], GREEDY)


def test_a_model_without_template_or_tokenizer(tmp_path: Path):
    bare = LLM(str(write_model(tmp_path / "a", chat_template=None)), enforce_eager=True, num_kv_blocks=16)
    with pytest.raises(ModelError, match="chat template"):
        bare.chat([{"role": "user", "content": "hi"}])
    assert AutoTokenizer.from_pretrained(tmp_path / "a").chat_template is None


def test_the_progress_bar_shows_when_asked(llm: LLM, capsys: pytest.CaptureFixture):
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(["a", "b"], GREEDY)
    shown = capsys.readouterr().err
    assert "generate: 100%" in shown and "2/2" in shown and "tokens/s" in shown


def test_metrics_and_prefix_cache(llm: LLM):
    prompt = "a long prompt that fills some blocks of the cache, " * 2
    llm.generate(prompt, GREEDY, use_tqdm=False)
    metrics = llm.generate(prompt, GREEDY, use_tqdm=False)[0].metrics
    assert metrics.num_cached_tokens == (len(prompt) - 1) // 16 * 16
    assert metrics.arrival_s <= metrics.first_token_s <= metrics.finished_s


def test_an_interrupt_leaves_a_usable_llm(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    before = tokens(llm.generate(["a", "b"], GREEDY, use_tqdm=False))
    step, calls = llm.engine.step, []

    def interrupted() -> list:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert not llm.engine.has_unfinished()
    assert llm.engine.stats.num_free_blocks == llm.engine.stats.num_blocks
    assert tokens(llm.generate(["a", "b"], GREEDY, use_tqdm=False)) == before


def test_calls_from_several_threads_run_one_after_the_other(llm: LLM):
    expected = tokens(llm.generate(["a", "b"], GREEDY, use_tqdm=False))
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(llm.generate, ["a", "b"], GREEDY, False) for _ in range(6)]
    assert [tokens(call.result()) for call in calls] == [expected] * 6


WRONG_CALLS = [
    (("a" * 128, GREEDY), "128 tokens, but max_model_len=128"),
    ((["fine", ""], GREEDY), "no tokens"),
    (({"prompt_token_ids": [264]}, GREEDY), "token id 264"),
    (({"prompt_token_ids": ["a"]}, GREEDY), "is not a prompt"),
    (({"text": "a"}, GREEDY), "is not a prompt"),
    (([["a"]], GREEDY), "is not a prompt"),
    ((["a", "b"], [GREEDY]), "1 sampling_params were given for 2 prompts"),
    ((["a"], [{"temperature": 0}]), "1 sampling_params were given"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_CALLS)
def test_wrong_calls_are_refused_before_anything_runs(llm: LLM, arguments: tuple, message: str):
    with pytest.raises(ConfigError, match=message):
        llm.generate(*arguments)
    assert not llm.engine.has_unfinished()


WRONG_SETTINGS = [
    ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
    ({"max_model_len": 4096}, "max_model_len=4096"),
    ({"max_model_len": 100, "num_kv_blocks": 2}, "2 KV blocks of 16 tokens hold 32 tokens"),
    ({"max_num_seqs": 0}, "max_num_seqs"),
    ({"block_size": -1}, "block_size"),
    ({"dtype": "float7"}, "float7"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG_SETTINGS)
def test_wrong_settings_are_refused(model_folder: Path, settings: dict, message: str):
    with pytest.raises((ConfigError, ModelError), match=message):
        LLM(str(model_folder), enforce_eager=True, **settings)


def test_few_blocks_shorten_texts_and_the_summary_says_so(model_folder: Path):
    llm = LLM(str(model_folder), enforce_eager=True, num_kv_blocks=3)
    summary = llm.summary()
    assert "3 blocks of 16 tokens = 48 tokens" in summary and "max_model_len is 48" in summary
    [output] = llm.generate("a" * 40, replace(GREEDY, max_tokens=100), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 8 and output.outputs[0].finish_reason == "length"


def test_the_summary_names_what_is_on_and_off(llm: LLM):
    lines = {line.split()[0]: line for line in llm.summary().splitlines()}
    assert "float32" in lines["model"] and "256 blocks" in lines["KV"] and "eager" in lines["start"]
    assert "prefix caching" in lines["on"] and "compile" in lines["off"] and "cudagraphs" in lines["off"]
    assert llm.explain().to_dict()["config"]["mode"]["value"] == "NONE"


def test_mode_none_is_eager_too(model_folder: Path):
    llm = LLM(str(model_folder), compilation_config=CompilationConfig(mode=0), num_kv_blocks=16)
    assert llm.explain().to_dict()["pieces"] == []
    assert len(llm.generate("a", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) > 0
