"""CompilationConfig: every setting of the compile, with its allowed values and what it affects.

One declaration of each field is the source of the flags, the validation, `--help` and docs/options.md. A field
left at None takes its value from the level, the device or the default rule; see `resolve`.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onegraph.errors import ConfigError, nearest


class CompilationMode(enum.IntEnum):
    """How much of the pipeline runs."""

    NONE = 0
    STOCK_TORCH_COMPILE = 1
    DYNAMO_TRACE_ONCE = 2
    ONEGRAPH = 3


class CUDAGraphMode(enum.Enum):
    """What is recorded as CUDA graphs."""

    NONE = "NONE"
    PIECEWISE = "PIECEWISE"
    FULL = "FULL"
    FULL_DECODE_ONLY = "FULL_DECODE_ONLY"
    FULL_AND_PIECEWISE = "FULL_AND_PIECEWISE"


CAPTURE_SIZES = "cudagraph_capture_sizes"
"""Among `compile_sizes` it stands for the sizes that are recorded."""

PADDING = ("keep", "zero", "last")
"""What `cudagraph_padding` takes beside whole numbers."""


@dataclass(frozen=True)
class FieldInfo:
    """What is declared about a field.

    `kind` is how a value is read: `int`, `bool`, `str`, `choice`, `mode`, `cudagraph_mode`, `ints`, `sizes`,
    `ranges`, `strs`, `counts`, `policies` or `dict`. `affects` predicts what a change reaches: the `graph`, the
    `kernels`, or `nothing` of what is compiled.
    """

    kind: str
    affects: str
    doc: str
    choices: tuple[str, ...] = ()

    @property
    def has_parts(self) -> bool:
        """Whether it is an object whose parts can be given one by one."""
        return self.kind in ("dict", "counts", "policies")


def _field(kind: str, affects: str, doc: str, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=None, metadata={"info": FieldInfo(kind, affects, doc, choices)})


@dataclass(frozen=True)
class CompilationConfig:
    """The settings of a compile; each field's meaning stands in docs/options.md. Raises ConfigError when made."""

    level: int | None = _field("int", "graph", "optimisation level 0..3: the default of most other fields")
    mode: CompilationMode | None = _field(
        "mode", "graph", "how much of the pipeline runs", tuple(CompilationMode.__members__)
    )
    backend: str | None = _field(
        "choice", "kernels", "what compiles the captured graph", ("inductor", "aot_eager", "eager")
    )
    splitting_ops: tuple[str, ...] | None = _field("strs", "graph", "ops at which the graph is split; [] is one piece")
    passes: Mapping[str, Any] | None = _field(
        "dict", "graph", "a pass's name: false to leave it out, true, or its options"
    )
    extra_passes: tuple[str, ...] | None = _field(
        "strs", "graph", "passes of yours, as module:Class or the name of an entry point"
    )
    check_passes: bool | None = _field(
        "bool", "nothing", "compare each pass's pieces before and after, on sample data, with fp64 as the judge"
    )
    eager_pieces: tuple[int, ...] | None = _field("ints", "graph", "numbers of pieces that run uncompiled")
    compile_sizes: tuple[int | str, ...] | None = _field(
        "sizes", "kernels", "sizes that get an artifact of their own; `cudagraph_capture_sizes` stands for those"
    )
    compile_ranges: tuple[Any, ...] | None = _field(
        "ranges", "kernels", "ranges with an artifact of their own: pairs [from, to], or the sizes at which they end"
    )
    cudagraph_mode: CUDAGraphMode | None = _field(
        "cudagraph_mode",
        "nothing",
        "what is recorded and replayed: CUDA graphs, or the same on a CPU",
        tuple(CUDAGraphMode.__members__),
    )
    cudagraph_capture_sizes: tuple[int, ...] | None = _field(
        "ints", "nothing", "sizes that are recorded; [] is 1, 2, 4, 8, by 8 to 256, by 16 to 512"
    )
    cudagraph_traffic: Mapping[str, int] | None = _field(
        "counts", "nothing", "how many calls there are of which size: the sizes that are recorded are chosen for them"
    )
    cudagraph_memory_mib: int | None = _field(
        "int", "nothing", "the most that recordings may take, in MiB: the sizes are chosen to fit; 0 is no limit"
    )
    cudagraph_check: str | None = _field(
        "choice",
        "nothing",
        "always: each replay also overwrites what the last one left, and an output that is still held is an error",
        ("first", "always"),
    )
    cudagraph_lazy: bool | None = _field("bool", "nothing", "record a size when it is first used")
    cudagraph_debug: bool | None = _field(
        "bool", "nothing", "compare each replay with the same call without the recording"
    )
    cudagraph_padding: Mapping[str, int | str] | None = _field(
        "policies",
        "nothing",
        "by argument, what stands in the rows with which a call runs at the next recorded size: keep, zero, last, or a "
        "number",
    )
    on_memory_change: str | None = _field(
        "choice", "nothing", "when memory that a recording reads has moved", ("error", "rerecord")
    )
    dynamic_shapes: str | None = _field(
        "choice", "graph", "how dynamic sizes are traced", ("unbacked", "backed", "backed_size_oblivious")
    )
    on_constraint: str | None = _field("choice", "graph", "when a model narrows its range", ("error", "split"))
    on_state_change: str | None = _field(
        "choice", "nothing", "when captured Python state has changed", ("recapture", "error")
    )
    freeze: bool | None = _field("bool", "nothing", "your promise that captured state never changes")
    plan_memory: bool | None = _field(
        "bool",
        "nothing",
        "intermediate values keep their places from call to call; false: each piece allocates, and checks its inputs",
    )
    compile_cache_save_format: str | None = _field(
        "choice",
        "nothing",
        "how artifacts are kept; unpacked: as sources too, whose edits are used",
        ("binary", "unpacked"),
    )
    inductor_compile_config: Mapping[str, Any] | None = _field("dict", "kernels", "options of Inductor, by name")
    autotune: str | None = _field(
        "choice", "kernels", "choose kernels by measuring, as recorded, or not at all", ("record", "replay", "off")
    )
    max_num_tokens: int | None = _field("int", "graph", "the most that a dynamic dim without a max may be")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                object.__setattr__(self, field.name, checked(field.name, value))

    @classmethod
    def of(cls, value: CompilationConfig | Mapping[str, Any] | int | str | None) -> CompilationConfig:
        """From a config, a dict of fields, a level 0..3, JSON text, or `O2`. Raises ConfigError."""
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, bool):
            raise ConfigError(f"a compilation config can't be {value}", hint="give a dict, a level 0..3, or None")
        if isinstance(value, int):
            return cls(level=value)
        if isinstance(value, str):
            return cls.of(_parsed(value))
        if not isinstance(value, Mapping):
            raise ConfigError(f"a compilation config can't be a {type(value).__name__}", hint="give a dict or a level")
        for name in value:
            if name not in FIELDS:
                raise ConfigError(
                    f"CompilationConfig has no field {name!r}",
                    where="compilation config",
                    hint=nearest(str(name), FIELDS),
                )
        return cls(**value)

    def given(self) -> dict[str, Any]:
        """The fields that were set."""
        pairs = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in pairs if value is not None}

    def merged(self, over: Mapping[str, Any]) -> CompilationConfig:
        """This config with other fields laid over it."""
        return CompilationConfig.of({**self.given(), **over})


FIELDS: Mapping[str, FieldInfo] = {
    field.name: field.metadata["info"] for field in dataclasses.fields(CompilationConfig)
}


def _parsed(text: str) -> Any:
    stripped = text.strip().removeprefix("-").removeprefix("O").removeprefix("=")
    if stripped.isdecimal():
        return int(stripped)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{text!r} is neither a level nor JSON",
            where="compilation config",
            hint='such as 2, or {"backend": "eager"}',
        ) from error
    if not isinstance(value, Mapping):
        raise ConfigError(f"{text!r} is no JSON object", where="compilation config")
    return value


def checked(name: str, value: Any) -> Any:
    """A field's value in its own type. Raises ConfigError with the field, the value, and what it may be."""
    info = FIELDS[name]
    if info.kind == "mode":
        return _member(CompilationMode, name, value)
    if info.kind == "cudagraph_mode":
        return _member(CUDAGraphMode, name, value)
    if info.kind == "choice":
        if value not in info.choices:
            raise ConfigError(f"{name}={value!r}", where=name, hint=nearest(str(value), info.choices))
        return value
    if info.kind == "bool":
        if not isinstance(value, bool):
            raise _wrong(name, value, "true or false")
        return value
    if info.kind == "int":
        whole = _whole(name, value, 3 if name == "level" else None)
        if name == "max_num_tokens" and whole == 0:
            raise _wrong(name, value, "a whole number, 1 or more")
        return whole
    if info.kind == "ints":
        return tuple(_whole(name, item, None) for item in _items(name, value))
    if info.kind == "sizes":
        items = (value,) if value == CAPTURE_SIZES else _items(name, value)
        return tuple(item if item == CAPTURE_SIZES else _whole(name, item, None) for item in items)
    if info.kind == "ranges":
        return tuple(_range(name, item) for item in _items(name, value))
    if info.kind == "strs":
        items = _items(name, value)
        if not all(isinstance(item, str) for item in items):
            raise _wrong(name, value, "a list of strings")
        return items
    if info.kind == "counts":
        return _counts(name, value)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong(name, value, "an object with names as keys")
    if info.kind == "policies":
        _refuse_other_padding(name, value)
    return dict(value)


def _counts(name: str, value: Any) -> dict[str, int]:
    """Counts by size; sizes may be given as numbers, and are text as JSON's keys are."""
    sizes = [str(size) for size in value] if isinstance(value, Mapping) else []
    if not isinstance(value, Mapping) or not all(size.isdecimal() and int(size) for size in sizes):
        raise _wrong(name, value, 'an object with sizes as keys, such as {"1": 900, "8": 100}')
    return {size: _whole(name, count, None) for size, count in zip(sizes, value.values(), strict=True)}


def _refuse_other_padding(name: str, value: Mapping[str, Any]) -> None:
    for path, policy in value.items():
        is_number = isinstance(policy, int) and not isinstance(policy, bool)
        if not is_number and policy not in PADDING:
            close = f"; {nearest(policy, PADDING)}" if isinstance(policy, str) else ""
            raise ConfigError(
                f"{name}.{path}={policy!r}", where=name, hint=f"it takes {', '.join(PADDING)} or a whole number{close}"
            )


def _wrong(name: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"{name}={value!r}", where=name, hint=f"it takes {wanted}")


def _member(kind: Any, name: str, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value.upper() in kind.__members__:
        return kind[value.upper()]
    if isinstance(value, int) and not isinstance(value, bool) and value in [member.value for member in kind]:
        return kind(value)
    members = [f"{m.name} ({m.value})" if isinstance(m.value, int) else m.name for m in kind]
    close = nearest(value.upper(), kind.__members__) if isinstance(value, str) else f"known: {', '.join(members)}"
    raise ConfigError(f"{name}={value!r}", where=name, hint=close)


def _whole(name: str, value: Any, most: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (most is not None and value > most):
        raise _wrong(name, value, f"a whole number 0..{most}" if most is not None else "whole numbers, 0 or more")
    return value


def _items(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise _wrong(name, value, "a list")
    return tuple(value)


def _range(name: str, value: Any) -> tuple[int, int] | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return _whole(name, value, None)
    items = _items(name, value)
    first, last = (_whole(name, item, None) for item in items) if len(items) == 2 else (1, 0)
    if first > last:
        raise _wrong(name, value, "endpoints, or pairs [from, to]")
    return (first, last)
