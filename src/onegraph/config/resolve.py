"""The effective configuration: each value with the reason why it is what it is.

Levels give defaults, the user's fields go over them, ONEGRAPH_COMPILATION_CONFIG over those. What was asked for
and can't be honoured is a ConfigError.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from onegraph.config.compilation import CAPTURE_SIZES, FIELDS, CompilationConfig, CompilationMode, CUDAGraphMode
from onegraph.env import Environment
from onegraph.errors import ConfigError

DEFAULT_LEVEL = 2
LEVEL_MODES = (
    CompilationMode.NONE,
    CompilationMode.DYNAMO_TRACE_ONCE,
    CompilationMode.ONEGRAPH,
    CompilationMode.ONEGRAPH,
)
AUTOTUNED: Mapping[str, Any] = {"max_autotune": True}  # what measuring needs of Inductor's options
_CAPTURING = (CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.ONEGRAPH)
TUNING_OPTIONS = ("max_autotune", "max_autotune_gemm")
ATTENTION_OPS = ("onegraph::write_kv_cache", "onegraph::paged_attention")


@dataclass(frozen=True)
class DeviceRules:
    """What configuration may ask for on a device, and what it records by itself."""

    device: str
    cudagraph_modes: frozenset[CUDAGraphMode]
    default_cudagraph_mode: CUDAGraphMode
    default_capture_sizes: tuple[int, ...] = ()
    """Where these are few, each is recorded when it first comes; none stand for all sizes, recorded at the start."""
    records_uncompiled: bool = False
    """Whether a module can be recorded whole that isn't compiled."""


@dataclass(frozen=True)
class ResolvedConfig:
    """The effective values, named as in CompilationConfig. `why` maps each name to its reason."""

    level: int
    mode: CompilationMode
    backend: str
    splitting_ops: tuple[str, ...]
    passes: Mapping[str, Any]
    extra_passes: tuple[str, ...]
    check_passes: bool
    eager_pieces: tuple[int, ...]
    compile_sizes: tuple[int, ...]
    compile_ranges: tuple[Any, ...]
    cudagraph_mode: CUDAGraphMode
    cudagraph_capture_sizes: tuple[int, ...]
    cudagraph_traffic: Mapping[str, int]
    cudagraph_memory_mib: int
    cudagraph_check: str
    cudagraph_lazy: bool
    cudagraph_debug: bool
    cudagraph_padding: Mapping[str, int | str]
    on_memory_change: str
    dynamic_shapes: str
    on_constraint: str
    on_state_change: str
    freeze: bool
    plan_memory: bool
    compile_cache_save_format: str
    inductor_compile_config: Mapping[str, Any]
    autotune: str
    max_num_tokens: int
    why: Mapping[str, str]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """`{name: {"value": JSON-able, "why": text}}`, in the order of the fields."""
        return {name: {"value": _jsonable(getattr(self, name)), "why": self.why[name]} for name in FIELDS}

    def asked(self, name: str) -> bool:
        """Whether a user or the environment gave the value."""
        return is_asked(self.why[name])


def is_asked(why: str) -> bool:
    """Whether a reason of `ResolvedConfig.why` says that a user or the environment gave the value."""
    return why in ("user", "ONEGRAPH_COMPILATION_CONFIG", "ONEGRAPH_COMPILE_CACHE_SAVE_FORMAT")


@dataclass(frozen=True)
class Default:
    """A value and its reason."""

    value: Any
    why: str = "default"


OF_RECORDINGS = (
    "cudagraph_capture_sizes",
    "cudagraph_traffic",
    "cudagraph_memory_mib",
    "cudagraph_check",
    "cudagraph_lazy",
    "cudagraph_debug",
    "cudagraph_padding",
    "on_memory_change",
)
"""Settings of recordings; whoever gives one asks for recordings, or for an error where there can be none."""

ALWAYS: Mapping[str, Any] = {
    "passes": {},
    "extra_passes": (),
    "check_passes": False,
    "eager_pieces": (),
    "compile_sizes": (),
    "compile_ranges": (),
    "cudagraph_capture_sizes": (),
    "cudagraph_traffic": {},
    "cudagraph_memory_mib": 0,
    "cudagraph_check": "first",
    "cudagraph_lazy": False,
    "cudagraph_debug": False,
    "cudagraph_padding": {},
    "on_memory_change": "error",
    "dynamic_shapes": "unbacked",
    "on_constraint": "error",
    "on_state_change": "recapture",
    "freeze": False,
    "plan_memory": True,
    "compile_cache_save_format": "binary",
    "inductor_compile_config": {},
    "max_num_tokens": 8192,
}


def resolve(
    config: CompilationConfig,
    *,
    rules: DeviceRules,
    environment: Environment,
    enforce_eager: bool = False,
) -> ResolvedConfig:
    """Works out the effective values. Raises ConfigError for what contradicts itself or can't be honoured."""
    given = _asked(config, environment)
    _refuse_what_cant_be_done(given, rules)
    levels = _by_level(given, rules, enforce_eager)
    _refuse_contradictions(given, levels["mode"], rules, enforce_eager)
    _refuse_unpacking_nowhere(given, environment)
    values = {name: Default(value) for name, value in ALWAYS.items()} | levels | given
    values |= _recorded_by_default(values, given, rules)
    values |= _autotuned(values, asked="autotune" in given)
    values["compile_sizes"] = _with_capture_sizes(values)
    _refuse_recording_nothing(given, values["cudagraph_mode"])
    return ResolvedConfig(
        **{name: values[name].value for name in FIELDS},
        why={name: values[name].why for name in FIELDS},
    )


def _asked(config: CompilationConfig, environment: Environment) -> dict[str, Default]:
    """What the user and, over it, the environment ask for. Objects are merged key by key."""
    asked = {name: Default(value, "user") for name, value in config.given().items()}
    save_format = environment.compile_cache_save_format
    for source, settings in (
        ("ONEGRAPH_COMPILE_CACHE_SAVE_FORMAT", {"compile_cache_save_format": save_format} if save_format else {}),
        ("ONEGRAPH_COMPILATION_CONFIG", environment.compilation_config or {}),
    ):
        try:
            over = CompilationConfig.of(settings).given()
        except ConfigError as error:
            raise ConfigError(error.message, where=source, hint=error.hint) from error
        for name, value in over.items():
            under = asked.get(name)
            if under is not None and FIELDS[name].has_parts:
                asked[name] = Default({**under.value, **value}, f"{under.why}, {source}")
            else:
                asked[name] = Default(value, source)
    return asked


def _by_level(given: Mapping[str, Default], rules: DeviceRules, enforce_eager: bool) -> dict[str, Default]:
    level = given.get("level", Default(DEFAULT_LEVEL))
    why = f"level -O{level.value}" if "level" in given else f"level -O{level.value} (default)"
    mode = Default(CompilationMode.NONE, "enforce_eager") if enforce_eager else Default(LEVEL_MODES[level.value], why)
    mode = given.get("mode", mode)
    because = f"mode={mode.value.name}"
    uncompiled = mode.value is CompilationMode.NONE
    backend = given.get("backend", Default("eager", because) if uncompiled else Default("inductor", why))
    cudagraphs = Default(rules.default_cudagraph_mode, f"device rule: {rules.device}")
    if enforce_eager or level.value < 2:
        cudagraphs = Default(CUDAGraphMode.NONE, "enforce_eager" if enforce_eager else why)
    elif mode.value not in _CAPTURING:
        whole = uncompiled and rules.records_uncompiled and cudagraphs.value is not CUDAGraphMode.NONE
        cudagraphs = Default(CUDAGraphMode.FULL if whole else CUDAGraphMode.NONE, because)
    elif backend.value != "inductor":
        cudagraphs = Default(CUDAGraphMode.NONE, f"backend={backend.value}")
    return {
        "level": level,
        "mode": mode,
        "backend": backend,
        "splitting_ops": (
            Default(ATTENTION_OPS, why) if mode.value is CompilationMode.ONEGRAPH else Default((), because)
        ),
        "cudagraph_mode": cudagraphs,
        "autotune": Default("record" if level.value >= 3 else "off", why),
    }


def _recorded_by_default(
    values: Mapping[str, Default], given: Mapping[str, Default], rules: DeviceRules
) -> dict[str, Default]:
    """What goes with recordings that nobody asked for: they are made anew where memory moves; few of them when needed.

    Raises ConfigError where sizes are both given and to be chosen.
    """
    chosen_for = [name for name in ("cudagraph_traffic", "cudagraph_memory_mib") if name in given and given[name].value]
    sizes = given.get(CAPTURE_SIZES)
    if chosen_for and sizes is not None and sizes.value:
        raise ConfigError(
            f"{CAPTURE_SIZES}={_jsonable(sizes.value)} ({sizes.why}) gives the sizes that {chosen_for[0]} "
            f"({given[chosen_for[0]].why}) is there to choose",
            where="configuration",
            hint="leave one of the two out",
        )
    recorded = values["cudagraph_mode"]
    if "cudagraph_mode" in given or recorded.value is CUDAGraphMode.NONE:
        return {}
    wanted: dict[str, Any] = {"on_memory_change": "rerecord"}
    if rules.default_capture_sizes and not chosen_for:
        wanted |= {CAPTURE_SIZES: rules.default_capture_sizes, "cudagraph_lazy": True}
    return {name: Default(value, recorded.why) for name, value in wanted.items() if name not in given}


def _autotuned(values: Mapping[str, Default], *, asked: bool) -> dict[str, Default]:
    """Whether kernels are chosen by measuring: asked for, or by Inductor's own options, or by level; and these options.

    Raises ConfigError where what was asked for can't be, or Inductor's options say otherwise.
    """
    tuning, options, mode = values["autotune"], values["inductor_compile_config"], values["mode"].value
    said = [value for name, value in options.value.items() if name in TUNING_OPTIONS]
    never = f"backend={values['backend'].value}" if values["backend"].value != "inductor" else ""
    if mode not in _CAPTURING:
        never = f"mode={mode.name}"
    if not asked and said:
        tuning = Default("record" if any(said) else "off", f"inductor_compile_config: {options.why}")
    if not asked and never:
        tuning = Default("off", never)
    if asked and tuning.value != "off" and never:
        raise _contradiction(tuning, never)
    if asked and said and any(said) != (tuning.value != "off"):
        raise _contradiction(tuning, f"{' or '.join(TUNING_OPTIONS)} in inductor_compile_config ({options.why})")
    if tuning.value != "off" and not said:
        why = tuning.why if options.why in ("default", tuning.why) else f"{tuning.why}, {options.why}"
        options = Default({**AUTOTUNED, **options.value}, why)
    return {"autotune": tuning, "inductor_compile_config": options}


def _contradiction(tuning: Default, other: str) -> ConfigError:
    return ConfigError(
        f"autotune={tuning.value} ({tuning.why}) contradicts {other}",
        where="configuration",
        hint="leave one of the two out",
    )


def _with_capture_sizes(values: Mapping[str, Default]) -> Default:
    """The sizes that get artifacts, with those that are recorded in the place of their name."""
    asked, recorded = values["compile_sizes"], values[CAPTURE_SIZES].value
    if CAPTURE_SIZES not in asked.value:
        return asked
    if not recorded:
        raise ConfigError(
            f"compile_sizes ({asked.why}) names {CAPTURE_SIZES}, and no sizes are recorded",
            where="compile_sizes",
            hint=f"give sizes as numbers, or {CAPTURE_SIZES}",
        )
    sizes = [size for item in asked.value for size in (recorded if item == CAPTURE_SIZES else (item,))]
    return Default(tuple(dict.fromkeys(sizes)), asked.why)


def _refuse_contradictions(
    given: Mapping[str, Default], mode: Default, rules: DeviceRules, enforce_eager: bool
) -> None:
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
    recorded = given.get("cudagraph_mode")
    if recorded is not None and recorded.value not in _recordable(mode.value, rules):
        of_what = "pieces of one" if _recordable(mode.value, rules) != {CUDAGraphMode.NONE} else "one"
        raise ConfigError(
            f"mode={mode.value.name} ({mode.why}) captures no graph, and cudagraph_mode={recorded.value.name} "
            f"({recorded.why}) records {of_what}",
            where="configuration",
            hint="leave one of the two out",
        )
    for name in ("passes", "extra_passes", "check_passes"):
        if name in given and given[name].value and mode.value not in _CAPTURING:
            raise ConfigError(
                f"mode={mode.value.name} ({mode.why}) captures no graph, and {name} ({given[name].why}) is about one",
                where="configuration",
                hint="leave one of the two out",
            )
    backend = given.get("backend")
    if mode.value is CompilationMode.NONE and backend is not None and backend.value != "eager":
        raise ConfigError(
            f"mode=NONE ({mode.why}) compiles nothing, and backend={backend.value} ({backend.why}) asks for a compiler",
            where="configuration",
            hint="leave one of the two out, or give mode=ONEGRAPH too",
        )


def _recordable(mode: CompilationMode, rules: DeviceRules) -> set[CUDAGraphMode]:
    """How calls can be recorded: in all ways where a graph is captured, else whole or not at all."""
    if mode in _CAPTURING:
        return set(CUDAGraphMode)
    if mode is CompilationMode.NONE and rules.records_uncompiled:
        return {CUDAGraphMode.NONE, CUDAGraphMode.FULL, CUDAGraphMode.FULL_DECODE_ONLY}
    return {CUDAGraphMode.NONE}


def _refuse_recording_nothing(given: Mapping[str, Default], mode: Default) -> None:
    """A setting of recordings that is asked for where there are none would be ignored."""
    for name in OF_RECORDINGS:
        if name in given and given[name].value != ALWAYS[name] and mode.value is CUDAGraphMode.NONE:
            raise ConfigError(
                f"{name}={_jsonable(given[name].value)} ({given[name].why}), and nothing is recorded: "
                f"cudagraph_mode=NONE ({mode.why})",
                where="configuration",
                hint=f"give cudagraph_mode too, such as FULL, or leave {name} out",
            )


def _refuse_unpacking_nowhere(given: Mapping[str, Default], environment: Environment) -> None:
    save_format = given.get("compile_cache_save_format", Default("binary"))
    if save_format.value == "unpacked" and environment.disable_compile_cache:
        raise ConfigError(
            f"compile_cache_save_format=unpacked ({save_format.why}) contradicts ONEGRAPH_DISABLE_COMPILE_CACHE=1: "
            "artifacts are unpacked into the compile cache",
            where="configuration",
            hint="leave one of the two out",
        )


def _refuse_what_cant_be_done(given: Mapping[str, Default], rules: DeviceRules) -> None:
    asked = given.get("cudagraph_mode")
    if asked is not None and asked.value not in rules.cudagraph_modes:
        raise ConfigError(
            f"cudagraph_mode={asked.value.name} ({asked.why}) can't be honoured on {rules.device}",
            where="configuration",
            hint="leave it out, or give NONE",
        )


def _jsonable(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, tuple | list):
        return [_jsonable(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    return value


assert {field.name for field in fields(ResolvedConfig)} - {"why"} == set(FIELDS)
