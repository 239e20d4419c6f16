"""SamplingParams: ranges, and errors that name field, value and what is allowed."""

import copy
import math
import pickle

import pytest

from onegraph.engine.sampling_params import SamplingParams
from onegraph.errors import ConfigError

WRONG = [
    ("n", 0),
    ("n", 1.0),
    ("temperature", -0.1),
    ("temperature", math.inf),
    ("temperature", math.nan),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", True),
    ("min_p", 1.5),
    ("seed", "x"),
    ("max_tokens", 0),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("stop", ""),
    ("stop", [1]),
    ("stop", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]),
    ("ignore_eos", 1),
    ("logprobs", -1),
    ("prompt_logprobs", 1.5),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0.0),
    ("logit_bias", {1: 101}),
    ("logit_bias", {"1": 1}),
    ("logit_bias", [1]),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(name: str, value: object):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{name: value})
    assert f"SamplingParams.{name}={value!r}" in str(caught.value)
    assert "give " in str(caught.value)


def test_an_unknown_name_is_a_type_error():
    with pytest.raises(TypeError, match="beam_width"):
        SamplingParams(beam_width=2)


def test_it_is_a_value():
    params = SamplingParams(stop="a", stop_token_ids=[1, 2], logit_bias={3: -1})
    assert params.stop_strings == ("a",) and params.stop_ids == (1, 2) and params.bias == {3: -1.0}
    assert params == copy.deepcopy(params) == pickle.loads(pickle.dumps(params))
    assert len({params, copy.copy(params)}) == 1
    with pytest.raises(AttributeError):
        params.n = 2


def test_borders_are_allowed():
    SamplingParams(temperature=0, top_p=1, top_k=-1, min_p=1, max_tokens=None, min_tokens=5, logit_bias={0: -100})
    assert SamplingParams(temperature=0).greedy and not SamplingParams(temperature=0.01).greedy
