"""The effective configuration: each value with the reason why it is what it is.

Levels give defaults, the user's fields go over them, ONEGRAPH_COMPILATION_CONFIG over those. What was asked for
and can't be honoured is a ConfigError; a default that can't be is lowered, with a reason and a count.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from onegraph.config.compilation import FIELDS, CompilationConfig, CompilationMode, CUDAGraphMode
from onegraph.counters import counters
from onegraph.env import Environment
from onegraph.errors import ConfigError

DEFAULT_LEVEL = 2
ATTENTION_OPS = ("onegraph::paged_attention",)


@dataclass(frozen=True)
class DeviceRules:
    """What configuration may ask for on a device."""

    device: str
    cudagraph_modes: frozenset[CUDAGraphMode]
    default_cudagraph_mode: CUDAGraphMode


@dataclass(frozen=True)
class ResolvedConfig:
    """The effective values, named as in CompilationConfig. `why` maps each name to its reason."""

    level: int
    mode: CompilationMode
    backend: str
    splitting_ops: tuple[str, ...]
    passes: Mapping[str, Any]
    extra_passes: tuple[str, ...]
    eager_pieces: tuple[int, ...]
    compile_sizes: tuple[int, ...]
    compile_ranges: tuple[Any, ...]
    cudagraph_mode: CUDAGraphMode
    cudagraph_capture_sizes: tuple[int, ...]
    cudagraph_check: str
    cudagraph_lazy: bool
    cudagraph_debug: bool
    on_memory_change: str
    dynamic_shapes: str
    on_constraint: str
    on_state_change: str
    freeze: bool
    compile_cache_save_format: str
    inductor_compile_config: Mapping[str, Any]
    max_num_tokens: int
    why: Mapping[str, str]
    downgrades: tuple[str, ...]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """`{name: {"value": JSON-able, "why": text}}`, in the order of the fields."""
        return {name: {"value": _jsonable(getattr(self, name)), "why": self.why[name]} for name in FIELDS}


@dataclass(frozen=True)
class Default:
    """A value and its reason."""

    value: Any
    why: str = "default"


ALWAYS: Mapping[str, Any] = {
    "passes": {},
    "extra_passes": (),
    "eager_pieces": (),
    "compile_sizes": (),
    "compile_ranges": (),
    "cudagraph_capture_sizes": (),
    "cudagraph_check": "first",
    "cudagraph_lazy": False,
    "cudagraph_debug": False,
    "on_memory_change": "error",
    "dynamic_shapes": "unbacked",
    "on_constraint": "error",
    "on_state_change": "recapture",
    "freeze": False,
    "compile_cache_save_format": "binary",
    "inductor_compile_config": {},
    "max_num_tokens": 8192,
}

# What this version can't do yet: the values other than these are refused, with the reason.
HONOURED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "splitting_ops": (((),), "this version compiles the whole graph as one piece"),
    "extra_passes": (((),), "this version runs no passes of its own or of users"),
    "compile_sizes": (((),), "this version makes one artifact for all sizes"),
    "compile_ranges": (((),), "this version makes one artifact for all sizes"),
    "cudagraph_capture_sizes": (((),), "this version makes no recordings"),
    "cudagraph_check": ((), "this version makes no recordings"),
    "cudagraph_lazy": ((False,), "this version makes no recordings"),
    "cudagraph_debug": ((False,), "this version makes no recordings"),
    "on_memory_change": ((), "this version makes no recordings"),
    "dynamic_shapes": (("unbacked",), "this version traces sizes as unbacked only"),
    "on_constraint": (("error",), "this version doesn't split a range by constraints"),
    "on_state_change": (("recapture",), "this version doesn't check captured state between calls"),
    "freeze": ((False,), "this version doesn't check captured state between calls"),
    "compile_cache_save_format": (("binary",), "this version keeps artifacts as binary only"),
}


def resolve(
    config: CompilationConfig,
    *,
    rules: DeviceRules,
    environment: Environment,
    enforce_eager: bool = False,
) -> ResolvedConfig:
    """Works out the effective values. Raises ConfigError for what contradicts itself or can't be honoured."""
    given = {name: Default(value, "user") for name, value in config.given().items()}
    if environment.compile_cache_save_format is not None:
        given["compile_cache_save_format"] = Default(
            CompilationConfig.of({"compile_cache_save_format": environment.compile_cache_save_format}).given()[
                "compile_cache_save_format"
            ],
            "ONEGRAPH_COMPILE_CACHE_SAVE_FORMAT",
        )
    if environment.compilation_config is not None:
        laid_over = CompilationConfig.of(environment.compilation_config).given()
        given.update({name: Default(value, "ONEGRAPH_COMPILATION_CONFIG") for name, value in laid_over.items()})
    _refuse_contradictions(given, enforce_eager)
    _refuse_what_cant_be_done(given, rules)
    values = {name: Default(value) for name, value in ALWAYS.items()}
    values.update(_by_level(given, rules, enforce_eager))
    values.update(given)
    downgrades = _lower_defaults(values)
    return ResolvedConfig(
        **{name: values[name].value for name in FIELDS},
        why={name: values[name].why for name in FIELDS},
        downgrades=downgrades,
    )


def _by_level(given: Mapping[str, Default], rules: DeviceRules, enforce_eager: bool) -> dict[str, Default]:
    level = given.get("level", Default(DEFAULT_LEVEL))
    why = f"level -O{level.value}" if level.why != "default" else f"level -O{level.value} (default)"
    modes = (
        CompilationMode.NONE,
        CompilationMode.DYNAMO_TRACE_ONCE,
        CompilationMode.ONEGRAPH,
        CompilationMode.ONEGRAPH,
    )
    mode = Default(CompilationMode.NONE, "enforce_eager") if enforce_eager else Default(modes[level.value], why)
    mode = given.get("mode", mode)
    uncompiled = mode.value is CompilationMode.NONE
    backend = Default("eager", f"mode={mode.value.name}") if uncompiled else Default("inductor", why)
    split = (
        Default(ATTENTION_OPS, why)
        if mode.value is CompilationMode.ONEGRAPH
        else Default((), f"mode={mode.value.name}")
    )
    cudagraphs = Default(rules.default_cudagraph_mode, f"device rule: {rules.device}")
    if enforce_eager or level.value < 2:
        cudagraphs = Default(CUDAGraphMode.NONE, "enforce_eager" if enforce_eager else why)
    found = {
        "level": level,
        "mode": mode,
        "backend": backend,
        "splitting_ops": split,
        "cudagraph_mode": cudagraphs,
    }
    if level.value == 3 and backend.value == "inductor":
        options = given.get("inductor_compile_config", Default({})).value
        found["inductor_compile_config"] = Default({"max_autotune": True}, why)
        if options:  # the user's options go over the level's
            given["inductor_compile_config"] = Default(  # type: ignore[index]
                {"max_autotune": True, **options}, f"{why}, user"
            )
    return found


def _refuse_contradictions(given: Mapping[str, Default], enforce_eager: bool) -> None:
    mode, backend = given.get("mode"), given.get("backend")
    if enforce_eager:
        for name, neutral in (
            ("mode", CompilationMode.NONE),
            ("backend", "eager"),
            ("cudagraph_mode", CUDAGraphMode.NONE),
        ):
            if name in given and given[name].value != neutral:
                raise ConfigError(
                    f"enforce_eager contradicts {name}={_jsonable(given[name].value)} ({given[name].why})",
                    where="configuration",
                    hint="leave one of the two out",
                )
    if mode is not None and mode.value is CompilationMode.NONE and backend is not None and backend.value != "eager":
        raise ConfigError(
            f"mode=NONE compiles nothing, and backend={backend.value} ({backend.why}) asks for a compiler",
            where="configuration",
            hint="leave one of the two out",
        )


def _refuse_what_cant_be_done(given: Mapping[str, Default], rules: DeviceRules) -> None:
    for name, (honoured, reason) in HONOURED.items():
        if name in given and given[name].value not in honoured and ALWAYS.get(name) != given[name].value:
            raise ConfigError(
                f"{name}={_jsonable(given[name].value)} ({given[name].why}) can't be honoured: {reason}",
                where="configuration",
                hint=f"leave {name} out",
            )
    if "passes" in given:
        for name in given["passes"].value:
            raise ConfigError(f"there is no pass {name!r}", where="passes", hint="this version has no passes")
    asked = given.get("cudagraph_mode")
    if asked is not None and asked.value not in rules.cudagraph_modes:
        raise ConfigError(
            f"cudagraph_mode={asked.value.name} ({asked.why}) can't be honoured on {rules.device}: "
            "this version makes no recordings there",
            where="configuration",
            hint="leave it out, or give NONE",
        )


def _lower_defaults(values: dict[str, Default]) -> tuple[str, ...]:
    split = values["splitting_ops"]
    if split.value == () or split.why == "user":
        return ()
    reason = "split at attention isn't in this version: the whole graph is one piece"
    values["splitting_ops"] = Default((), f"{split.why}, lowered: {HONOURED['splitting_ops'][1]}")
    counters.add("downgrades")
    return (reason,)


def _jsonable(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, tuple | list):
        return [_jsonable(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return value


assert {field.name for field in fields(ResolvedConfig)} - {"why", "downgrades"} == set(FIELDS)
