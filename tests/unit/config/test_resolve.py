"""Effective values: their order, their reasons, and what is refused or lowered."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from onegraph.config.compilation import FIELDS, CompilationConfig, CompilationMode, CUDAGraphMode
from onegraph.config.resolve import (
    ALWAYS,
    Default,
    DeviceRules,
    ResolvedConfig,
    _with_capture_sizes,
    resolve,
)
from onegraph.env import environment
from onegraph.errors import ConfigError

CPU = DeviceRules("cpu", frozenset({CUDAGraphMode.NONE}), CUDAGraphMode.NONE)
RECORDING = DeviceRules("fake", frozenset(CUDAGraphMode), CUDAGraphMode.FULL_AND_PIECEWISE)


def resolved(
    fields: Any = None, *, env: dict[str, Any] | None = None, rules: DeviceRules = CPU, enforce_eager: bool = False
) -> ResolvedConfig:
    return resolve(
        CompilationConfig.of(fields),
        rules=rules,
        environment=replace(environment(), compilation_config=env),
        enforce_eager=enforce_eager,
    )


@pytest.mark.parametrize(
    ("level", "mode", "backend", "options"),
    [
        (0, CompilationMode.NONE, "eager", {}),
        (1, CompilationMode.DYNAMO_TRACE_ONCE, "inductor", {}),
        (2, CompilationMode.ONEGRAPH, "inductor", {}),
        (3, CompilationMode.ONEGRAPH, "inductor", {"max_autotune": True}),
    ],
)
def test_levels(level: int, mode: CompilationMode, backend: str, options: dict[str, bool]) -> None:
    config = resolved(level)
    assert (config.mode, config.backend, config.inductor_compile_config) == (mode, backend, options)
    assert config.why["mode"] == f"level -O{level}"


@pytest.mark.parametrize(
    ("fields", "autotune", "why", "options"),
    [
        ({}, "off", "level -O2 (default)", {}),
        ({"level": 3}, "record", "level -O3", {"max_autotune": True}),
        ({"level": 3, "autotune": "off"}, "off", "user", {}),
        ({"level": 1, "autotune": "replay"}, "replay", "user", {"max_autotune": True}),
        ({"level": 3, "backend": "eager"}, "off", "backend=eager", {}),
        ({"level": 3, "mode": "STOCK_TORCH_COMPILE"}, "off", "mode=STOCK_TORCH_COMPILE", {}),
        ({"level": 3, "mode": "NONE"}, "off", "mode=NONE", {}),
        (
            {"inductor_compile_config": {"max_autotune_gemm": True}},
            "record",
            "inductor_compile_config: user",
            {"max_autotune_gemm": True},
        ),
        (
            {"level": 3, "inductor_compile_config": {"max_autotune": False}},
            "off",
            "inductor_compile_config: user",
            {"max_autotune": False},
        ),
    ],
)
def test_whether_kernels_are_chosen_by_measuring(
    fields: dict[str, Any], autotune: str, why: str, options: dict[str, Any]
) -> None:
    config = resolved(fields)
    assert (config.autotune, config.why["autotune"], config.inductor_compile_config) == (autotune, why, options)


def test_the_default_is_level_2() -> None:
    config = resolved()
    assert config.level == 2
    assert config.why["mode"] == "level -O2 (default)"


def test_what_goes_with_recordings_that_nobody_asked_for() -> None:
    """They are made when they are needed and anew where memory moves; what was asked for stands."""
    few = replace(RECORDING, default_capture_sizes=(1, 2))
    config = resolved(rules=few)
    assert (config.cudagraph_capture_sizes, config.cudagraph_lazy, config.on_memory_change) == (
        (1, 2),
        True,
        "rerecord",
    )
    assert {config.why[name] for name in ("cudagraph_capture_sizes", "cudagraph_lazy")} == {
        config.why["cudagraph_mode"]
    }
    config = resolved({"cudagraph_lazy": False, "cudagraph_traffic": {"3": 1}}, rules=few)
    assert (config.cudagraph_capture_sizes, config.cudagraph_lazy) == ((), False)
    config = resolved({"cudagraph_mode": "FULL"}, rules=few)
    assert (config.cudagraph_capture_sizes, config.cudagraph_lazy, config.on_memory_change) == ((), False, "error")
    for fields in ({"backend": "eager"}, {"mode": "STOCK_TORCH_COMPILE"}, {"mode": 0}):
        assert resolved(fields, rules=few).cudagraph_mode is CUDAGraphMode.NONE
    assert not resolved(rules=RECORDING).cudagraph_lazy, "all sizes are recorded at the start"


def test_levels_below_2_record_nothing() -> None:
    assert resolved(1, rules=RECORDING).cudagraph_mode is CUDAGraphMode.NONE
    assert resolved(2, rules=RECORDING).cudagraph_mode is CUDAGraphMode.FULL_AND_PIECEWISE


def test_the_user_goes_over_the_level_and_the_environment_over_both() -> None:
    config = resolved({"level": 1, "backend": "eager", "max_num_tokens": 5}, env={"backend": "aot_eager"})
    assert (config.backend, config.why["backend"]) == ("aot_eager", "ONEGRAPH_COMPILATION_CONFIG")
    assert (config.max_num_tokens, config.why["max_num_tokens"]) == (5, "user")
    assert config.why["mode"] == "level -O1"


def test_objects_are_merged_key_by_key() -> None:
    config = resolved(
        {"level": 3, "inductor_compile_config": {"cpp.threads": 1, "max_autotune": False}},
        env={"inductor_compile_config": {"cpp.threads": 2}},
    )
    assert config.inductor_compile_config == {"cpp.threads": 2, "max_autotune": False}
    assert config.why["inductor_compile_config"] == "user, ONEGRAPH_COMPILATION_CONFIG"


def test_the_save_format_variable() -> None:
    asked = replace(environment(), compile_cache_save_format="unpacked")
    config = resolve(CompilationConfig(), rules=CPU, environment=asked)
    assert config.compile_cache_save_format == "unpacked"
    assert config.why["compile_cache_save_format"] == "ONEGRAPH_COMPILE_CACHE_SAVE_FORMAT"
    assert config.asked("compile_cache_save_format")


def test_nothing_can_be_unpacked_into_a_cache_that_is_off() -> None:
    off = replace(environment(), disable_compile_cache=True)
    with pytest.raises(ConfigError, match="unpacked .user. contradicts ONEGRAPH_DISABLE_COMPILE_CACHE=1"):
        resolve(CompilationConfig(compile_cache_save_format="unpacked"), rules=CPU, environment=off)
    assert resolve(CompilationConfig(compile_cache_save_format="binary"), rules=CPU, environment=off)


@pytest.mark.parametrize(
    ("variables", "name", "told"),
    [
        ({"compile_cache_save_format": "zip"}, "ONEGRAPH_COMPILE_CACHE_SAVE_FORMAT", "zip"),
        ({"compilation_config": {"backed": "eager"}}, "ONEGRAPH_COMPILATION_CONFIG", "did you mean 'backend'"),
        ({"compilation_config": {"level": 7}}, "ONEGRAPH_COMPILATION_CONFIG", "level=7"),
    ],
)
def test_a_wrong_value_of_a_variable_names_the_variable(variables: dict[str, Any], name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        resolve(CompilationConfig(), rules=CPU, environment=replace(environment(), **variables))
    assert caught.value.where == name


def test_the_level_of_the_environment_goes_over_the_users() -> None:
    config = resolved({"level": 1, "backend": "aot_eager"}, env={"level": 3})
    assert (config.level, config.mode, config.backend) == (3, CompilationMode.ONEGRAPH, "aot_eager")
    assert config.why["level"] == "ONEGRAPH_COMPILATION_CONFIG"
    assert config.why["backend"] == "user"


def test_enforce_eager_compiles_nothing_at_any_level() -> None:
    config = resolved(3, enforce_eager=True, rules=RECORDING)
    assert (config.mode, config.backend) == (CompilationMode.NONE, "eager")
    assert config.cudagraph_mode is CUDAGraphMode.NONE
    assert config.inductor_compile_config == {}
    assert config.why["mode"] == "enforce_eager"


@pytest.mark.parametrize(
    ("fields", "env", "enforce_eager", "both"),
    [
        ({"mode": 3}, None, True, ("enforce_eager", "mode=ONEGRAPH")),
        ({"backend": "inductor"}, None, True, ("enforce_eager", "backend=inductor")),
        ({"cudagraph_mode": "FULL"}, None, True, ("enforce_eager", "cudagraph_mode=FULL")),
        ({"mode": 0, "backend": "inductor"}, None, False, ("mode=NONE (user)", "backend=inductor (user)")),
        ({"level": 0, "backend": "aot_eager"}, None, False, ("mode=NONE (level -O0)", "backend=aot_eager")),
        ({"mode": 0}, {"backend": "inductor"}, False, ("mode=NONE", "inductor (ONEGRAPH_COMPILATION_CONFIG)")),
    ],
)
def test_contradictions_name_both(fields: Any, env: Any, enforce_eager: bool, both: tuple[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(fields, env=env, enforce_eager=enforce_eager, rules=RECORDING)
    assert all(name in str(caught.value) for name in both)


def test_what_says_the_same_is_no_contradiction() -> None:
    config = resolved({"mode": 0, "backend": "eager", "cudagraph_mode": "NONE"}, enforce_eager=True)
    assert config.why["mode"] == "user"


OF_RECORDINGS: list[dict[str, Any]] = [
    {"cudagraph_capture_sizes": [1, 2]},
    {"cudagraph_traffic": {"1": 2}},
    {"cudagraph_memory_mib": 64},
    {"cudagraph_check": "always"},
    {"cudagraph_lazy": True},
    {"cudagraph_debug": True},
    {"cudagraph_padding": {"x": "zero"}},
    {"on_memory_change": "rerecord"},
]


@pytest.mark.parametrize("fields", OF_RECORDINGS, ids=lambda fields: next(iter(fields)))
def test_a_setting_of_recordings_is_refused_where_nothing_is_recorded(fields: dict[str, Any]) -> None:
    name = next(iter(fields))
    with pytest.raises(ConfigError, match="nothing is recorded: cudagraph_mode=NONE") as caught:
        resolved(fields)
    assert name in str(caught.value)
    with pytest.raises(ConfigError):
        resolved(env=fields)
    config = resolved({**fields, "cudagraph_mode": "FULL"}, rules=RECORDING)
    assert config.why[name] == "user" and config.cudagraph_mode is CUDAGraphMode.FULL


@pytest.mark.parametrize("fields", [{"mode": 0}, {"mode": 1}])
def test_a_mode_that_captures_nothing_has_nothing_to_record(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="captures no graph, and cudagraph_mode=FULL"):
        resolved({**fields, "cudagraph_mode": "FULL"}, rules=RECORDING)


def test_an_uncompiled_module_is_recorded_whole_where_the_device_can() -> None:
    can = replace(RECORDING, records_uncompiled=True)
    config = resolved({"mode": 0}, rules=can)
    assert config.cudagraph_mode is CUDAGraphMode.FULL and config.why["cudagraph_mode"] == "mode=NONE"
    assert resolved({"mode": 0}, rules=RECORDING).cudagraph_mode is CUDAGraphMode.NONE
    assert resolved({"mode": "STOCK_TORCH_COMPILE"}, rules=can).cudagraph_mode is CUDAGraphMode.NONE
    assert resolved(0, rules=can).cudagraph_mode is CUDAGraphMode.NONE
    assert resolved(rules=can, enforce_eager=True).cudagraph_mode is CUDAGraphMode.NONE
    for mode in ("FULL", "FULL_DECODE_ONLY"):
        assert resolved({"mode": 0, "cudagraph_mode": mode}, rules=can).cudagraph_mode is CUDAGraphMode[mode]
    for mode in ("PIECEWISE", "FULL_AND_PIECEWISE"):
        with pytest.raises(ConfigError, match=f"captures no graph, and cudagraph_mode={mode} .user. records pieces"):
            resolved({"mode": 0, "cudagraph_mode": mode}, rules=can)


def test_a_mode_that_a_device_has_not_is_refused() -> None:
    rules = DeviceRules("none", frozenset({CUDAGraphMode.NONE}), CUDAGraphMode.NONE)
    with pytest.raises(ConfigError, match="cudagraph_mode=PIECEWISE .user. can't be honoured on none"):
        resolved({"cudagraph_mode": "PIECEWISE"}, rules=rules)


@pytest.mark.parametrize("name", [next(iter(fields)) for fields in OF_RECORDINGS])
def test_asking_for_what_is_done_anyway_is_fine(name: str) -> None:
    config = resolved({name: ALWAYS[name]})
    assert getattr(config, name) == ALWAYS[name]
    assert config.why[name] == "user"


def test_the_graph_is_split_and_pieces_run_uncompiled_where_that_is_asked_for() -> None:
    config = resolved({"splitting_ops": ["onegraph::paged_attention"], "eager_pieces": [3, 7]})
    assert config.splitting_ops == ("onegraph::paged_attention",) and config.eager_pieces == (3, 7)


def test_the_graph_is_split_at_attention_unless_the_level_or_the_mode_says_otherwise() -> None:
    config = resolved()
    assert config.splitting_ops == ("onegraph::write_kv_cache", "onegraph::paged_attention")
    assert config.why["splitting_ops"] == "level -O2 (default)"
    assert resolved({"level": 3}).splitting_ops == config.splitting_ops
    for fields in ({"splitting_ops": []}, {"level": 1}, {"mode": 0}):
        assert resolved(fields).splitting_ops == ()


def test_the_sizes_that_are_recorded_can_have_artifacts_of_their_own() -> None:
    asked = {"compile_sizes": [8, "cudagraph_capture_sizes", 1], "cudagraph_capture_sizes": []}
    with pytest.raises(ConfigError, match="compile_sizes .user. names cudagraph_capture_sizes, and no sizes"):
        resolved(asked)
    sizes = _with_capture_sizes(
        {"compile_sizes": Default((8, "cudagraph_capture_sizes", 1), "user"),
         "cudagraph_capture_sizes": Default((1, 2, 4), "user")}
    )  # fmt: skip
    assert sizes.value == (8, 1, 2, 4)


def test_every_field_has_a_reason_and_prints_as_json() -> None:
    facts = resolved({"compile_sizes": []}).to_dict()
    assert list(facts) == list(FIELDS)
    assert all(item["why"] for item in facts.values())
    assert json.loads(json.dumps(facts))["mode"] == {"value": "ONEGRAPH", "why": "level -O2 (default)"}
