"""The flag parser: every spelling of one setting gives one setting."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onegraph.cli.flags import Parser, UsageError, add_model_flags, engine_config, split_compilation_words
from onegraph.config.compilation import FIELDS, CompilationConfig, CompilationMode
from onegraph.config.engine import EngineConfig
from onegraph.errors import ConfigError


def fields_of(*words: str) -> dict[str, object]:
    rest, fields = split_compilation_words(words)
    assert rest == []
    return fields


def engine_of(*words: str) -> EngineConfig:
    parser = Parser(prog="onegraph run")
    add_model_flags(parser)
    return engine_config(parser.parse_known_words(words), {})


@pytest.mark.parametrize(
    "words",
    [
        ("-O.backend=eager",),
        ("-O.backend", "eager"),
        ('-O.backend="eager"',),
        ("-O", '{"backend": "eager"}'),
        ('-O={"backend": "eager"}',),
        ('-O{"backend": "eager"}',),
        ("--compilation-config", '{"backend": "eager"}'),
        ("--compilation_config", '{"backend": "eager"}'),
        ('--compilation-config={"backend": "eager"}',),
        ('--compilation_config={"backend": "eager"}',),
    ],
)
def test_spellings_of_a_field(words: tuple[str, ...]) -> None:
    assert fields_of(*words) == {"backend": "eager"}


@pytest.mark.parametrize("words", [("-O3",), ("-O=3",), ("-O", "3"), ("-O.level=3",), ("--compilation-config=3",)])
def test_spellings_of_a_level(words: tuple[str, ...]) -> None:
    assert fields_of(*words) == {"level": 3}


@pytest.mark.parametrize("text", ["true", "True"])
def test_truth_as_json_and_as_python(text: str) -> None:
    assert fields_of(f"-O.freeze={text}") == {"freeze": True}


def test_a_switch_needs_no_value_and_takes_one() -> None:
    assert fields_of("-O.cudagraph_lazy") == {"cudagraph_lazy": True}
    assert fields_of("-O.cudagraph-lazy", "-O.cudagraph_debug") == {"cudagraph_lazy": True, "cudagraph_debug": True}
    assert fields_of("-O.cudagraph_lazy", "false") == {"cudagraph_lazy": False}
    assert split_compilation_words(["-O.cudagraph_lazy", "--json"])[0] == ["--json"]


@given(st.sampled_from(sorted(FIELDS)))
def test_dashes_and_underscores_are_equal(name: str) -> None:
    info = FIELDS[name]
    value = {"bool": "true", "int": "1", "mode": "0", "cudagraph_mode": "FULL"}.get(info.kind, "{}" * info.has_parts)
    text = value or (FIELDS[name].choices[0] if FIELDS[name].choices else "[]")
    assert fields_of(f"-O.{name}={text}") == fields_of(f"-O.{name.replace('_', '-')}={text}")


def test_policies_are_given_one_by_one() -> None:
    words = ("-O.cudagraph_padding.x=zero", "-O.cudagraph-padding.slots", "-1", "-O.cudagraph_padding.batch['y']=last")
    assert fields_of(*words) == {"cudagraph_padding": {"x": "zero", "slots": -1, "batch['y']": "last"}}


def test_nested_keys_and_order() -> None:
    assert fields_of(
        "-O.inductor_compile_config.max_autotune=true",
        "-O.inductor_compile_config.cpp.threads=2",
        "-O.passes.fuse_add=false",
        "-O",
        '{"passes": {"fuse_rope": {"width": 4}}, "backend": "eager"}',
        "-O.backend=aot_eager",
    ) == {
        "inductor_compile_config": {"max_autotune": True, "cpp.threads": 2},
        "passes": {"fuse_add": False, "fuse_rope": {"width": 4}},
        "backend": "aot_eager",
    }


def test_dashes_in_keys_are_underscores_too() -> None:
    assert fields_of("-O.inductor-compile-config.max-autotune=true", "-O.passes.fuse-add=false") == {
        "inductor_compile_config": {"max_autotune": True},
        "passes": {"fuse_add": False},
    }


@pytest.mark.parametrize("words", [("-O.mode=null",), ("-O", '{"mode": null}'), ("-O.mode", "null")])
def test_null_sets_nothing(words: tuple[str, ...]) -> None:
    assert fields_of(*words) == {}
    assert fields_of("-O.mode=NONE", *words) == {"mode": CompilationMode.NONE}


def test_other_words_stay_in_their_order() -> None:
    rest, fields = split_compilation_words(["MODEL", "-O1", "--seed", "3", "-O.backend", "eager", "--json"])
    assert rest == ["MODEL", "--seed", "3", "--json"]
    assert fields == {"level": 1, "backend": "eager"}


def test_words_after_two_dashes_are_left_alone() -> None:
    assert split_compilation_words(["-O1", "--", "-O2"]) == (["--", "-O2"], {"level": 1})


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        (("-O.backed=eager",), ConfigError, "did you mean 'backend'"),
        (("-O.backend=inductr",), ConfigError, "did you mean 'inductor'"),
        (("-O.backend.x=1",), ConfigError, "has no parts"),
        (("-O.backend",), UsageError, "needs a value"),
        (("-O",), UsageError, "needs a value"),
        (("--compilation-config",), UsageError, "needs a value"),
        (("-O9",), ConfigError, "0..3"),
        (("-Ofast",), ConfigError, "neither a level nor JSON"),
        (("-O", '{"backed": 1}'), ConfigError, "did you mean 'backend'"),
    ],
)
def test_refused(words: tuple[str, ...], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        fields_of(*words)


@given(st.fixed_dictionaries({}, optional={"backend": st.just("eager"), "level": st.integers(0, 3)}))
def test_dotted_flags_equal_the_config(fields: dict[str, object]) -> None:
    words = [f"-O.{name}={json.dumps(value)}" for name, value in fields.items()]
    assert CompilationConfig.of(fields_of(*words)) == CompilationConfig.of(fields)


def test_engine_flags_in_both_spellings() -> None:
    config = engine_of(
        "MODEL", "--max_num_seqs=3", "--block-size", "32", "--no-enable_prefix_caching", "--enforce_eager", "--seed=-1"
    )
    assert config.model == "MODEL"
    assert (config.max_num_seqs, config.block_size, config.seed) == (3, 32, -1)
    assert config.enforce_eager
    assert not config.enable_prefix_caching


def test_no_flags_are_the_engine_s_defaults() -> None:
    assert engine_of() == EngineConfig()


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--max-num-seq=3", "did you mean '--max-num-seqs'"),
        ("--enforce-eger", "did you mean '--enforce-eager'"),
        ("--max-num-seqs=many", "invalid int value: 'many'"),
    ],
)
def test_an_unknown_flag_or_value_is_told(word: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        engine_of(word)
