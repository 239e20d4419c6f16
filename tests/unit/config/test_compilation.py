"""CompilationConfig: what it takes, in which spellings, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onegraph.config.compilation import FIELDS, PADDING, CompilationConfig, CompilationMode, CUDAGraphMode
from onegraph.errors import ConfigError

SIZES = st.lists(st.integers(0, 10**6), max_size=4)
VALUES = {
    "int": st.integers(1, 3),
    "bool": st.booleans(),
    "mode": st.sampled_from([m.name for m in CompilationMode] + [m.value for m in CompilationMode]),
    "cudagraph_mode": st.sampled_from([m.name for m in CUDAGraphMode]),
    "ints": SIZES,
    "sizes": st.lists(st.integers(0, 10**6) | st.just("cudagraph_capture_sizes"), max_size=4),
    "counts": st.dictionaries(st.integers(1, 99).map(str), st.integers(0, 99), max_size=2),
    "ranges": st.lists(st.tuples(st.integers(0, 99), st.integers(100, 999)).map(list), max_size=3),
    "strs": st.lists(st.sampled_from(["onegraph::paged_attention", "a:B"]), max_size=2),
    "policies": st.dictionaries(st.sampled_from(["x", "batch['ids']"]), st.sampled_from(PADDING) | st.integers()),
    "dict": st.dictionaries(st.sampled_from(["max_autotune", "cpp.threads"]), st.booleans() | st.integers(0, 8)),
}


def any_value(name: str) -> st.SearchStrategy[object]:
    return st.sampled_from(FIELDS[name].choices) if FIELDS[name].kind == "choice" else VALUES[FIELDS[name].kind]


@given(st.fixed_dictionaries({}, optional={name: any_value(name) for name in FIELDS}))
def test_a_dict_its_json_and_keywords_give_the_same(fields: dict[str, object]) -> None:
    config = CompilationConfig(**fields)  # type: ignore[arg-type]
    assert CompilationConfig.of(fields) == config
    assert CompilationConfig.of(json.dumps(fields)) == config
    assert CompilationConfig.of(config) is config
    assert set(config.given()) == set(fields)
    assert CompilationConfig().merged(config.given()) == config


@pytest.mark.parametrize("spelling", [3, "3", "O3", "-O3", "O=3", '{"level": 3}', {"level": 3}])
def test_spellings_of_a_level(spelling: object) -> None:
    assert CompilationConfig.of(spelling) == CompilationConfig(level=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("spelling", [CompilationMode.NONE, 0, "NONE", "none"])
def test_spellings_of_a_mode(spelling: object) -> None:
    assert CompilationConfig(mode=spelling).mode is CompilationMode.NONE  # type: ignore[arg-type]


def test_nothing_is_set_at_first() -> None:
    assert CompilationConfig.of(None).given() == {}


def test_it_is_frozen_and_keeps_its_own_copy() -> None:
    options = {"max_autotune": True}
    config = CompilationConfig(inductor_compile_config=options)
    options["max_autotune"] = False
    assert config.inductor_compile_config == {"max_autotune": True}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.level = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"backed": "eager"}, "did you mean 'backend'"),
        ({"backend": "inductr"}, "did you mean 'inductor'"),
        ({"mode": "ONEGRPH"}, "did you mean 'ONEGRAPH'"),
        ({"mode": 7}, r"known: NONE \(0\)"),
        ({"mode": True}, r"known: NONE \(0\)"),
        ({"cudagraph_mode": "PIECEWIZE"}, "did you mean 'PIECEWISE'"),
        ({"dynamic_shapes": "backd"}, "did you mean 'backed'"),
        ({"level": 4}, "whole number 0..3"),
        ({"level": -1}, "whole number 0..3"),
        ({"level": True}, "whole number 0..3"),
        ({"level": "2"}, "whole number 0..3"),
        ({"max_num_tokens": 0}, "1 or more"),
        ({"freeze": 1}, "true or false"),
        ({"compile_sizes": 8}, "a list"),
        ({"compile_sizes": "8"}, "a list"),
        ({"compile_sizes": [8, "9"]}, "whole numbers"),
        ({"compile_ranges": [[9, 8]]}, "pairs"),
        ({"compile_ranges": [[1, 2, 3]]}, "pairs"),
        ({"compile_ranges": [[-5, 3]]}, "0 or more"),
        ({"compile_ranges": [[True, 3]]}, "0 or more"),
        ({"compile_ranges": [-1]}, "0 or more"),
        ({"splitting_ops": [1]}, "list of strings"),
        ({"passes": ["fuse"]}, "an object"),
        ({"inductor_compile_config": {1: 2}}, "an object"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        CompilationConfig.of(fields)
    assert next(iter(fields)) in str(caught.value)


@pytest.mark.parametrize("value", [True, 1.5, [], "two", "[1]", "4", -1, "\u00b2"])
def test_what_is_no_config_at_all_is_refused(value: object) -> None:
    with pytest.raises(ConfigError):
        CompilationConfig.of(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [object(), 1.5, "", b"eager"], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_another_type_by_its_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"\] {name}=") as caught:
        CompilationConfig(**{name: value})  # type: ignore[arg-type]
    assert caught.value.where == name
    assert caught.value.hint


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_known_when_it_is_misspelled(name: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{name}'"):
        CompilationConfig.of({name + "x": None})


def test_each_field_says_what_it_affects() -> None:
    assert {info.affects for info in FIELDS.values()} == {"graph", "kernels", "nothing"}
    assert all(info.doc for info in FIELDS.values())
