"""The sampler against a naive one that looks at one request at a time; and that batch-mates change
nothing.
"""

import math
import random

import pytest
import torch

from onegraph.engine.penalties import Penalties
from onegraph.engine.request import Request, Sequence, random_stream
from onegraph.engine.sampler import Sampler
from onegraph.engine.sampling_params import SamplingParams
from onegraph.engine.token_filters import keep_likeliest

V = 50
EOS = frozenset({3})


def sequence(params: SamplingParams, prompt: list[int], output: list[int], number: int = 0) -> Sequence:
    request = Request("r", None, tuple(prompt), params)
    stream = random_stream(params.seed, 0, 0, number)
    return Sequence(request=request, index=0, token_ids=[*prompt, *output], max_tokens=100, stream=stream)


def naive_probabilities(logits: torch.Tensor, one: Sequence) -> list[float]:
    """The distribution that a request asks for, token by token in Python floats; one-hot where greedy."""
    p, values = one.params, [float(x) for x in logits]
    output = one.output_token_ids
    if len(output) < p.min_tokens:
        for stop in [*p.stop_ids, *([] if p.ignore_eos else EOS)]:
            values[stop] = -math.inf
    for token, bias in p.bias.items():
        values[token] += bias
    for token in range(V):
        if token in one.token_ids:
            values[token] = (
                values[token] / p.repetition_penalty if values[token] > 0 else values[token] * p.repetition_penalty
            )
        values[token] -= p.frequency_penalty * output.count(token)
        values[token] -= p.presence_penalty if token in output else 0
    best = max(values)
    if p.greedy:
        return [float(token == values.index(best)) for token in range(V)]
    weights = [math.exp((v - best) / p.temperature) for v in values]
    weights = [w if w >= p.min_p else 0.0 for w in weights]
    order = sorted(range(V), key=lambda token: -weights[token])
    if p.top_k > 0:
        for token in order[p.top_k :]:
            weights[token] = 0.0
    total, before = sum(weights), 0.0
    for token in order:
        share = weights[token] / total
        if before >= p.top_p:
            weights[token] = 0.0
        before += share
    return [w / sum(weights) for w in weights]


PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.5),
    SamplingParams(top_k=5),
    SamplingParams(top_k=1),
    SamplingParams(top_p=0.7),
    SamplingParams(top_p=1e-6),
    SamplingParams(min_p=0.3),
    SamplingParams(top_k=8, top_p=0.5, min_p=0.02, temperature=1.7),
    SamplingParams(temperature=0, presence_penalty=1.5),
    SamplingParams(frequency_penalty=-1.2),
    SamplingParams(temperature=0, repetition_penalty=3.0),
    SamplingParams(repetition_penalty=0.4, presence_penalty=0.5, frequency_penalty=0.7),
    SamplingParams(temperature=0, logit_bias={7: 100}),
    SamplingParams(logit_bias={7: -100, 9: 3}),
    SamplingParams(min_tokens=9, stop_token_ids=[1, 2], logit_bias={3: 50, 1: 50}),
    SamplingParams(min_tokens=2, stop_token_ids=[1, 2], logit_bias={1: 50}),
    SamplingParams(min_tokens=5, stop_token_ids=[1, 2], logit_bias={1: 50}),
    SamplingParams(min_tokens=6, stop_token_ids=[1, 2], logit_bias={1: 50}),
    SamplingParams(min_tokens=9, ignore_eos=True, logit_bias={3: 50}),
]


def batch(seed: int = 0) -> tuple[torch.Tensor, list[Sequence]]:
    rng = random.Random(seed)
    sequences = [
        sequence(p, [rng.randrange(V) for _ in range(6)], [rng.randrange(V) for _ in range(5)], number)
        for number, p in enumerate(PARAMS)
    ]
    return torch.randn(len(PARAMS), V, generator=torch.Generator().manual_seed(seed)) * 2, sequences


class Fixed(random.Random):
    """A stream that gives one number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value


@pytest.mark.parametrize("uniform", [0.0, 0.15, 0.5, 0.85, 1 - 2**-53])
def test_every_parameter_draws_from_the_naive_distribution(uniform: float):
    """The token is the one at which the naive cumulated distribution passes the uniform number."""
    logits, sequences = batch()
    for one in sequences:
        one.stream = Fixed(uniform)
    given = logits.clone()
    sampled = Sampler(EOS)(logits, sequences)
    assert torch.equal(given, logits)
    for row, one in enumerate(sequences):
        below, probabilities = 0.0, naive_probabilities(logits[row], one)
        token = sampled.token_ids[row]
        below = sum(probabilities[:token])
        assert probabilities[token] > 0, one.params
        assert below - 1e-5 <= uniform <= below + probabilities[token] + 1e-5, one.params


def test_the_distribution_is_drawn_as_often_as_it_says():
    logits, sequences = batch()
    row = 9
    expected = naive_probabilities(logits[row], sequences[row])
    sampler, one, draws = Sampler(EOS), sequences[row], 4000
    counts = [0] * V
    for _ in range(draws // 100):
        same = [sequence(one.params, [1], [], number=random.randrange(2**60)) for _ in range(100)]
        for token in sampler(logits[row].expand(100, V), same).token_ids:
            counts[token] += 1
    for token in range(V):
        deviation = math.sqrt(draws * expected[token] * (1 - expected[token]))
        assert abs(counts[token] - draws * expected[token]) <= 5 * deviation + 1e-9


def test_batch_mates_and_position_change_nothing():
    logits, sequences = batch()
    together = Sampler(EOS)(logits, sequences).token_ids
    _, again = batch()
    alone = [Sampler(EOS)(logits[row : row + 1], [one]).token_ids[0] for row, one in enumerate(again)]
    _, turned = batch()
    backwards = Sampler(EOS)(logits.flip(0), turned[::-1]).token_ids[::-1]
    assert together == alone == backwards


def test_a_batch_that_stays_counts_the_tokens_that_came():
    """The counts of the penalties are kept from step to step; a fresh sampler counts anew."""
    logits, sequences = batch()
    _, others = batch()
    kept = Sampler(EOS)
    for step in range(6):
        logits = torch.randn(logits.shape, generator=torch.Generator().manual_seed(step)) * 2
        tokens = kept(logits, sequences).token_ids
        assert tokens == Sampler(EOS)(logits, others).token_ids
        for one, other, token in zip(sequences, others, tokens, strict=True):
            one.token_ids.append(token)
            other.token_ids.append(token)
        if step == 3:  # one leaves
            logits, sequences, others = logits[1:], sequences[1:], others[1:]


def test_penalties_of_more_tokens_than_there_was_room_for():
    params = SamplingParams(temperature=0, frequency_penalty=1.0, repetition_penalty=2.0)
    output = [*range(1000, 1060), *range(1000, 1030)]
    ones = [sequence(params, list(range(1000)), []), sequence(params, [0], [])]
    penalties, logits = Penalties(ones, [0, 1], torch.device("cpu")), torch.ones(2, 2000)
    penalties.apply_(logits.clone())
    for one in ones:
        one.token_ids += output
    penalties.apply_(logits)
    for row, num_prompt in ((0, 1000), (1, 1)):
        expected = torch.ones(2000)
        expected[:num_prompt] = 0.5
        expected[1000:1030], expected[1030:1060] = 0.5 - 2, 0.5 - 1
        assert torch.equal(logits[row], expected)


def test_seeds():
    logits = torch.zeros(1, V)

    def tokens(seed: int | None, index: int = 0, engine_seed: int = 0, number: int = 0) -> list[int]:
        one = sequence(SamplingParams(seed=seed), [1], [])
        one.stream = random_stream(seed, index, engine_seed, number)
        sampler = Sampler(EOS)
        return [sampler(logits, [one]).token_ids[0] for _ in range(12)]

    assert tokens(1) == tokens(1, engine_seed=5, number=9)  # its own seed is all that matters
    assert tokens(None) == tokens(None)
    different = [
        tokens(1),
        tokens(2),
        tokens(1, index=1),
        tokens(None),
        tokens(None, number=1),
        tokens(None, engine_seed=1),
    ]
    assert len({tuple(t) for t in different}) == len(different)


def test_ties_are_kept_whatever_the_batch_mates_ask():
    """Four equal logits and top_k=2: all four can be drawn, alone and beside a request that sorts more of
    them.
    """
    logits = torch.full((2, V), -10.0)
    logits[:, [4, 8, 15, 16]] = 1.0
    for params in (SamplingParams(top_k=2), SamplingParams(top_k=2, top_p=0.9)):
        for mate in (SamplingParams(top_k=2), SamplingParams(top_p=0.999, top_k=40)):
            seen = set()
            for uniform in (0.1, 0.3, 0.6, 0.9):
                one = sequence(params, [1], [])
                one.stream = Fixed(uniform)
                seen.add(Sampler(EOS)(logits, [one, sequence(mate, [1], [])]).token_ids[0])
            assert seen == {4, 8, 15, 16}


@pytest.mark.parametrize("flatness", [0.01, 3.0])
def test_top_p_over_a_large_vocabulary(flatness: float):
    """Flat rows keep more tokens than are sorted at first, peaked rows fewer; with top_k rows beside."""
    logits = torch.randn(4, 6000, generator=torch.Generator().manual_seed(0)).double() * torch.tensor(
        [[flatness], [0.01], [3.0], [0.5]]
    )
    top_p = torch.tensor([[0.5], [0.99], [0.8], [0.7]])
    top_k = torch.tensor([[6000], [6000], [6000], [700]])
    for k in (top_k, None):
        kept = keep_likeliest(logits.float(), min_p=None, top_k=k, top_p=top_p).isfinite()
        for row in range(4):
            num_k = 6000 if k is None else int(k[row])
            values = logits[row].sort(descending=True).values[:num_k]
            probs = values.softmax(-1)
            expected = int((probs.cumsum(-1) - probs < float(top_p[row])).sum())
            assert abs(int(kept[row].sum()) - expected) <= 1


def test_bf16_logits_and_extreme_temperatures():
    logits = (torch.randn(3, V, generator=torch.Generator().manual_seed(0)) * 8).bfloat16()
    ones = [sequence(SamplingParams(temperature=t, top_p=0.9), [1], []) for t in (2e-5, 1e30, 1.0)]
    sampled = Sampler(EOS)(logits, ones)
    assert sampled.token_ids[0] == int(logits[0].float().argmax())
    assert not sampled.broken


def test_a_row_without_finite_logits_is_told_and_the_others_are_fine():
    logits, sequences = batch()
    expected = Sampler(EOS)(logits, batch()[1]).token_ids
    bad = logits.clone()
    bad[0, 3], bad[4, 3], bad[5] = math.nan, math.inf, -math.inf
    sampled = Sampler(EOS)(bad, sequences)
    assert sampled.broken == {0, 4, 5}
    fine = [row for row in range(len(sequences)) if row not in sampled.broken]
    assert [sampled.token_ids[row] for row in fine] == [expected[row] for row in fine]


def test_logprobs_are_the_models_own_before_any_setting():
    logits, _ = batch()
    p = SamplingParams(temperature=0, logprobs=3, logit_bias={7: 100}, repetition_penalty=2.0)
    ones = [sequence(p, [1], []), sequence(SamplingParams(temperature=0), [1], [])]
    ones.append(sequence(SamplingParams(temperature=0, logprobs=0), [1], []))
    sampled = Sampler(EOS)(logits[:3], ones)
    expected = torch.log_softmax(logits.double(), -1)
    order = expected[0].argsort(descending=True).tolist()
    assert sampled.token_ids[0] == 7 and sampled.ranked[1] is None
    first = sampled.ranked[0]
    assert [r.token_id for r in first] == [*order[:3], 7]
    assert [r.rank for r in first] == [1, 2, 3, order.index(7) + 1]
    for r in first:
        assert r.logprob == pytest.approx(float(expected[0, r.token_id]), abs=1e-5)
    assert [(r.token_id, r.rank) for r in sampled.ranked[2]] == [(int(expected[2].argmax()), 1)]
