"""The engine around a fake model: what is computed, when it stops, and what is left behind."""

import math
import random
from typing import Any

import pytest
import torch
from fake_model import VOCAB, Letters, drain, expected_tokens, letters, make_engine, row_logits

from onegraph.engine.sampling_params import SamplingParams
from onegraph.errors import ConfigError


def greedy(max_tokens: int = 8, **params) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **params)


def all_free(engine) -> bool:
    stats = engine.stats
    return stats.num_free_blocks == stats.num_blocks and not stats.num_running and not stats.num_waiting


SHAPES = [
    {},
    {"budget": 3},
    {"budget": 1, "max_num_seqs": 3},
    {"num_blocks": 16, "block_size": 4, "budget": 9},
    {"num_blocks": 64, "block_size": 1, "caching": False},
    {"num_blocks": 7, "block_size": 10, "budget": 5, "caching": False},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prompts_together_give_what_each_gives_alone(shape: dict[str, int]):
    rng = random.Random(1)
    engine, model = make_engine(**shape)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))] for _ in range(10)]
    prompts += [prompts[0] + [5, 6], prompts[0][:3], prompts[1]]
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, greedy(rng.randrange(1, 24)))
    outputs = drain(engine)
    for number, prompt in enumerate(prompts):
        completion = outputs[str(number)].outputs[0]
        assert list(completion.token_ids) == expected_tokens(prompt, len(completion.token_ids))
        assert completion.finish_reason == "length" and outputs[str(number)].finished
        assert completion.text == "".join(map(letters, completion.token_ids)).replace(letters(VOCAB - 1), "")
    assert max(model.num_tokens) <= shape.get("budget", 32)
    assert all_free(engine)
    if shape.get("num_blocks") in (16, 7):
        assert engine.stats.num_preemptions > 0


def test_a_second_request_computes_only_what_is_new():
    engine, model = make_engine(budget=64)
    prompt = list(range(30))
    engine.add_request("a", prompt, greedy(1))
    engine.add_request("b", prompt, greedy(1))  # in the same step: nothing is cached yet
    drain(engine)
    engine.add_request("c", [*prompt, 50], greedy(1))
    output = drain(engine)["c"]
    assert model.num_tokens == [60, 31 - 28]
    assert output.metrics.num_cached_tokens == 28


def test_samples_share_a_prompt_and_differ():
    engine, model = make_engine()
    model.edit = torch.zeros_like
    params = SamplingParams(n=3, seed=1, max_tokens=8)
    engine.add_request("a", [1, 2], params)
    engine.add_request("b", [9, 9, 9], params)
    outputs = drain(engine)
    first = [tuple(c.token_ids) for c in outputs["a"].outputs]
    assert [c.index for c in outputs["a"].outputs] == [0, 1, 2] and len(set(first)) == 3
    assert first == [tuple(c.token_ids) for c in outputs["b"].outputs]  # flat logits: only the seed decides
    engine.add_request("c", [1], SamplingParams(seed=1, max_tokens=8))
    assert tuple(drain(engine)["c"].outputs[0].token_ids) == first[0]


@pytest.mark.parametrize("budget", [8, 64])
def test_samples_compute_their_prompt_once(budget: int):
    engine, model = make_engine(budget=budget)
    prompts = {"a": list(range(30)), "b": list(range(50, 80)), "short": [1, 2, 3]}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, greedy(2, n=3, prompt_logprobs=0 if name == "b" else None))
    outputs = drain(engine)
    for name, prompt in prompts.items():
        assert [list(c.token_ids) for c in outputs[name].outputs] == [expected_tokens(prompt, 2)] * 3
    num_of_other_samples = 2 * 2 * (30 - 28)  # two blocks' worth of tokens are behind the shared blocks
    assert sum(model.num_tokens) == 30 + 30 + num_of_other_samples + 3 * 3 + 9  # and 9 samples decode once
    assert all_free(engine)


def test_requests_without_a_seed_differ_from_each_other_and_repeat_with_the_engine():
    def texts() -> list[tuple[int, ...]]:
        engine, model = make_engine()
        model.edit = torch.zeros_like
        for number in range(3):
            engine.add_request(str(number), [1], SamplingParams(max_tokens=8))
        outputs = drain(engine)
        return [tuple(outputs[str(number)].outputs[0].token_ids) for number in range(3)]

    assert texts() == texts() and len(set(texts())) == 3


def test_seeds_and_penalties_survive_preemption():
    params = SamplingParams(seed=5, max_tokens=40, temperature=3.0, frequency_penalty=1.0, repetition_penalty=1.2)
    results = []
    for num_blocks in (64, 16):
        engine, _ = make_engine(num_blocks=num_blocks)
        for number in range(4):
            engine.add_request(str(number), [number, 1, 2], params)
        outputs = drain(engine)
        results.append([list(outputs[str(number)].outputs[0].token_ids) for number in range(4)])
        assert (engine.stats.num_preemptions > 0) == (num_blocks == 16)
    assert results[0] == results[1]


def test_end_of_text_and_stop_tokens():
    tokens = expected_tokens([1, 2, 3], 6)
    eos, stop = tokens[3], tokens[4]
    assert eos not in tokens[:3] and stop not in tokens[:4]
    engine, _ = make_engine(eos=frozenset({eos}))
    engine.add_request("eos", [1, 2, 3], greedy())
    engine.add_request("ignore", [1, 2, 3], greedy(6, ignore_eos=True))
    engine.add_request("stop", [1, 2, 3], greedy(ignore_eos=True, stop_token_ids=[stop]))
    engine.add_request("min", [1, 2, 3], greedy(min_tokens=5))
    outputs = {name: output.outputs[0] for name, output in drain(engine).items()}
    assert (list(outputs["eos"].token_ids), outputs["eos"].finish_reason, outputs["eos"].stop_reason) == (
        tokens[:4],
        "stop",
        None,
    )
    assert outputs["eos"].text == "".join(map(letters, tokens[:3]))
    assert list(outputs["ignore"].token_ids) == tokens and outputs["ignore"].finish_reason == "length"
    assert (list(outputs["stop"].token_ids), outputs["stop"].stop_reason) == (tokens[:5], stop)
    assert eos not in outputs["min"].token_ids[:4] and len(outputs["min"].token_ids) >= 5


def test_a_stop_string_across_tokens_cuts_the_text():
    tokens = expected_tokens([1, 2, 3], 6)
    text = "".join(map(letters, tokens))
    stop = text[3:6]  # from the middle of the second token to the end of the third
    assert text.index(stop) == 3
    engine, _ = make_engine()
    engine.add_request("a", [1, 2, 3], greedy(stop=["zzzz", stop]))
    engine.add_request("never", [1, 2, 3], greedy(6, stop="zzzz"))
    engine.add_request("later", [1, 2, 3], greedy(6, stop=[stop], min_tokens=3))
    outputs = drain(engine)
    done = outputs["a"].outputs[0]
    assert (done.text, done.finish_reason, done.stop_reason) == (text[:3], "stop", stop)
    assert list(done.token_ids) == tokens[:3]
    assert outputs["never"].outputs[0].text == text and outputs["never"].outputs[0].finish_reason == "length"
    assert outputs["later"].outputs[0].text == text  # it begins within the text of the first min_tokens tokens


def test_a_stream_never_shows_what_a_stop_string_takes_away():
    tokens = expected_tokens([1, 2, 3], 6)
    text = "".join(map(letters, tokens))
    engine, _ = make_engine()
    engine.add_request("a", [1, 2, 3], greedy(stop=[text[3:7]]), stream=True)
    shown = []
    while engine.has_unfinished():
        shown += [output.outputs[0].text for output in engine.step()]
    assert shown == [text[:2], text[2:3], "", ""]


def test_a_stop_string_that_waits_in_the_detokenizer_does_not_show_at_the_end():
    """The last token ends in half a character, so its text comes only when the length ends the sequence."""

    class Halves(Letters):
        def decode(self, ids: Any, **options: Any) -> str:
            text = super().decode(ids, **options)
            return text + "�" if len(ids) % 2 == 0 else text

    tokens = expected_tokens([1, 2, 3], 2)
    stop = letters(tokens[1])
    assert stop not in letters(tokens[0])
    for stream in (False, True):
        engine, _ = make_engine(tokenizer=Halves())
        engine.add_request("a", [1, 2, 3], greedy(2, stop=[stop]), stream=stream)
        pieces = [output.outputs[0] for _ in range(2) for output in engine.step()]
        assert "".join(piece.text for piece in pieces) == letters(tokens[0])
        assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", stop)


def test_the_outputs_of_a_stream_add_up_and_each_holds_only_what_is_new():
    engine, _ = make_engine(budget=4)
    params = greedy(12, n=3, logprobs=1, stop=["zz"])
    for stream in (False, True):
        engine.add_request(f"stream {stream}", [1, 2, 3, 4, 5, 6], params, stream=stream)
    pieces: list[dict[int, Any]] = []
    while engine.has_unfinished():
        for output in engine.step():
            if output.request_id == "stream True":
                pieces.append({sample.index: sample for sample in output.outputs})
            else:
                whole = output
    assert pieces and all(len(sample.token_ids) <= 1 for piece in pieces for sample in piece.values())
    for sample in whole.outputs:
        own = [piece[sample.index] for piece in pieces if sample.index in piece]
        assert [i for one in own for i in one.token_ids] == list(sample.token_ids)
        assert "".join(one.text for one in own) == sample.text
        assert [entry for one in own for entry in one.logprobs] == sample.logprobs
        assert [one.finish_reason for one in own if one.finish_reason] == [sample.finish_reason]


def test_a_batch_that_fails_names_its_requests_and_an_idle_engine_rehearses():
    engine, model = make_engine(max_num_seqs=1)
    engine.rehearse()
    assert sum(model.num_tokens) > 0 and engine.stats.num_generated_tokens == 0 and all_free(engine)

    def fail(inputs: object) -> None:
        raise RuntimeError("out of luck")

    engine.add_request("a", [1, 2, 3], greedy(4), stream=True)
    engine.add_request("b", [1, 2, 3], greedy(4))
    with pytest.raises(ConfigError, match="running"):
        engine.rehearse()
    model.before_call = fail
    result = engine.try_step()
    assert isinstance(result.failure, RuntimeError)
    assert [(o.request_id, o.finished, o.error) for o in result.outputs] == [
        ("a", True, "the batch failed: RuntimeError")
    ]
    model.before_call = lambda inputs: None
    assert list(drain(engine)["b"].outputs[0].token_ids) == expected_tokens([1, 2, 3], 4)


def test_the_models_length_ends_a_text():
    engine, _ = make_engine(max_model_len=16)
    engine.add_request("a", [1] * 12, greedy(None))
    engine.add_request("b", [1] * 15, greedy(100))
    outputs = drain(engine)
    assert [len(outputs[name].outputs[0].token_ids) for name in "ab"] == [4, 1]
    assert all(output.outputs[0].finish_reason == "length" for output in outputs.values())


@pytest.mark.parametrize("budget", [1, 4, 64])
@pytest.mark.parametrize("num_blocks", [16, 64])
def test_logprobs_of_prompt_and_output(budget: int, num_blocks: int):
    engine, _ = make_engine(budget=budget, num_blocks=num_blocks)
    prompts = {str(n): [n + 2, 50, 7, 7, 30, 2 * n, 11, 0, 3] for n in range(4)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, greedy(12, logprobs=2, prompt_logprobs=1, n=2))
    for name, output in drain(engine).items():
        prompt, done = prompts[name], output.outputs[1]
        all_ids = [*prompt, *done.token_ids]
        got = [*output.prompt_logprobs, *done.logprobs]
        assert len(got) == len(all_ids) and got[0] is None
        for at in range(1, len(all_ids)):
            expected = torch.log_softmax(row_logits(all_ids[:at]).double(), -1)
            num_top = 1 if at < len(prompt) else 2
            best = expected.topk(num_top)
            listed = list(got[at].items())
            assert len(listed) in (num_top, num_top + 1)
            assert [i for i, _ in listed[:num_top]] == best.indices.tolist()
            own = got[at][all_ids[at]]
            assert own.logprob == pytest.approx(float(expected[all_ids[at]]), abs=1e-5)
            assert own.rank == int((expected > expected[all_ids[at]]).sum()) + 1
            assert own.decoded_token == letters(all_ids[at])
        total = sum(entry[i].logprob for i, entry in zip(done.token_ids, done.logprobs, strict=True))
        assert done.cumulative_logprob == pytest.approx(total)
    assert all_free(engine)


def test_abort_frees_blocks_and_gives_what_was_there():
    engine, _ = make_engine()
    engine.add_request("a", [1, 2, 3], greedy(40))
    engine.add_request("b", [1, 2, 3], greedy(4))
    for _ in range(2):
        engine.step()
    aborted = engine.abort("a")
    assert aborted.finished and aborted.outputs[0].finish_reason == "abort"
    assert list(aborted.outputs[0].token_ids) == expected_tokens([1, 2, 3], 2)
    assert engine.abort("a") is None
    assert list(drain(engine)["b"].outputs[0].token_ids) == expected_tokens([1, 2, 3], 4)
    assert all_free(engine)


def test_one_request_with_nan_logits_does_not_lose_the_others(caplog):
    engine, model = make_engine()
    engine.add_request("bad", [100], greedy(4, ignore_eos=True))
    engine.add_request("good", [1, 2], greedy(4))

    def edit(logits: torch.Tensor) -> torch.Tensor:
        if len(model.num_tokens) == 2:
            logits[0] = math.nan
        return logits

    model.edit = edit
    outputs = drain(engine)
    assert outputs["bad"].outputs[0].finish_reason == "abort" and "NaN" in outputs["bad"].error
    assert list(outputs["bad"].outputs[0].token_ids) == expected_tokens([100], 1)
    assert list(outputs["good"].outputs[0].token_ids) == expected_tokens([1, 2], 4)
    assert outputs["good"].error is None
    assert "bad" in caplog.text and all_free(engine)


def test_a_model_that_raises_loses_its_batch_and_nothing_else():
    engine, model = make_engine(max_num_seqs=1)

    def fail(inputs: object) -> None:
        raise RuntimeError("out of luck")

    engine.add_request("a", [1, 2, 3, 4, 5], greedy(4))
    engine.add_request("b", [1, 2, 3, 4, 5], greedy(4))
    model.before_call = fail
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.step()
    model.before_call = lambda inputs: None
    outputs = drain(engine)
    assert list(outputs) == ["b"] and outputs["b"].metrics.num_cached_tokens == 0
    assert list(outputs["b"].outputs[0].token_ids) == expected_tokens([1, 2, 3, 4, 5], 4)
    assert all_free(engine)


def test_reset_after_an_interrupt_leaves_a_clean_engine():
    engine, model = make_engine()

    def interrupt(inputs: object) -> None:
        raise KeyboardInterrupt

    engine.add_request("a", [1, 2, 3], greedy(4))
    engine.step()
    model.before_call = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.reset()
    model.before_call = lambda inputs: None
    assert not engine.has_unfinished() and all_free(engine)
    engine.add_request("a", [4], greedy(4))
    assert list(drain(engine)["a"].outputs[0].token_ids) == expected_tokens([4], 4)


REFUSED = [
    ({"prompt_token_ids": []}, "no tokens"),
    ({"prompt_token_ids": [1] * 64}, "64 tokens.*max_model_len=64"),
    ({"prompt_token_ids": [1, VOCAB]}, f"token id {VOCAB} in the prompt"),
    ({"prompt_token_ids": [-1]}, "token id -1"),
    ({"params": SamplingParams(logit_bias={500: 1})}, "token id 500 in logit_bias"),
    ({"params": SamplingParams(stop_token_ids=[500])}, "token id 500 in stop_token_ids"),
    ({"params": SamplingParams(logprobs=102)}, "logprobs=102"),
    ({"params": SamplingParams(prompt_logprobs=102)}, "prompt_logprobs=102"),
    ({"request_id": "taken"}, "'taken' is already in use"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_can_not_be_served_is_refused_and_not_queued(arguments: dict, message: str):
    engine, _ = make_engine()
    engine.add_request("taken", [1], greedy())
    with pytest.raises(ConfigError, match=message):
        engine.add_request(**{"request_id": "a", "prompt_token_ids": [1], "params": greedy(), **arguments})
    assert list(drain(engine)) == ["taken"]


def test_without_a_tokenizer_stop_strings_are_refused_and_text_is_empty():
    class Nothing(Letters):
        def decode(self, ids: object, **_: object) -> str:
            raise AssertionError

    engine, _ = make_engine()
    engine.text.tokenizer = None
    with pytest.raises(ConfigError, match="tokenizer"):
        engine.add_request("a", [1], greedy(stop="x"))
    engine.add_request("b", [1], greedy(2, logprobs=1))
    done = drain(engine)["b"].outputs[0]
    assert done.text == "" and len(done.token_ids) == 2


def test_metrics_are_in_order():
    engine, _ = make_engine()
    engine.add_request("a", [1], greedy(3))
    metrics = drain(engine)["a"].metrics
    assert metrics.arrival_s < metrics.first_token_s < metrics.finished_s
