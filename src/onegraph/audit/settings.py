"""The settings that an audit changes: fields of the configuration, passes, variables, torch's switches, Inductor's.

Takes the BuildCall of the base. Gives Perturbations: each other value of a field that can be drawn by its type, each
pass without it and with another value of each option, each variable that `onegraph.env` reads, torch's global switches,
and all options of Inductor that are true or false.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.fx import Graph

from onegraph.audit.perturbation import Perturbation, Scope
from onegraph.build_call import BuildCall
from onegraph.config.compilation import FIELDS, CompilationConfig, FieldInfo
from onegraph.config.resolve import resolve
from onegraph.env import VARIABLES, environment, process_variables
from onegraph.ir.dims import DynamicDim
from onegraph.ir.passes import PassContext
from onegraph.passes.catalogue import CATALOGUE, IF_PRESENT
from onegraph.targets import device_rules
from onegraph.torch_compat.compiler_input import switched, switches
from onegraph.torch_compat.inductor import check_options


@dataclasses.dataclass(frozen=True)
class LeaveAsIs:
    """A pass of a user that rewrites nothing."""

    name: ClassVar[str] = "leave_as_is"
    requires: ClassVar[frozenset[str]] = frozenset()

    def apply(self, graph: Graph, context: PassContext) -> int:
        return 0


def settings(call: BuildCall, dims: Sequence[DynamicDim]) -> Iterator[Perturbation]:
    """All of them, in this order; `dims` are those of the base."""
    yield from _fields(call, dims)
    yield from _passes(call)
    yield from _variables()
    yield from _torch_switches(call)
    yield from _inductor_options()


def _fields(call: BuildCall, dims: Sequence[DynamicDim]) -> Iterator[Perturbation]:
    for name, info in FIELDS.items():
        was = call.config.to_dict()[name]["value"]
        for given in _other_values(name, info, was, dims):
            yield Perturbation(f"field.{name}", _words(was), _words(given[name]), configured(given), info.affects)


def _other_values(name: str, info: FieldInfo, was: Any, dims: Sequence[DynamicDim]) -> Iterator[dict[str, Any]]:
    """What to give instead of a field's value: for a type with few values all others, else one."""
    some_size = (dims[0].min + dims[0].max) // 2 if dims else 1
    drawn: dict[str, list[Any]] = {
        "level": [0, 1, 2, 3],
        "max_num_tokens": [max(was // 2, 1)] if isinstance(was, int) else [],
        "splitting_ops": [[], was[1:]] if isinstance(was, list) and was else [["torch.mm"]],
        "passes": [{entry.kind.name: False for entry in CATALOGUE}],
        "inductor_compile_config": [{"size_asserts": not switches()["size_asserts"]}],
        "eager_pieces": [[0]],
        "compile_sizes": [[some_size]],
        "compile_ranges": [[some_size]],
        "cudagraph_capture_sizes": [[some_size]],
        "cudagraph_traffic": [{str(some_size): 1}],
        "cudagraph_memory_mib": [1024],
        "cudagraph_padding": [{place.rpartition("[")[0]: "zero" for place in dims[0].inputs}] if dims else [],
    }
    if name == "extra_passes":
        path = f"{LeaveAsIs.__module__}:{LeaveAsIs.__qualname__}"
        yield {name: [path], "passes": {LeaveAsIs.name: {IF_PRESENT: True}}}
        return
    values = [not was] if info.kind == "bool" else drawn.get(name, list(info.choices))
    unlike = [value for value in values if value != was]
    yield from ({name: value} for index, value in enumerate(unlike) if value not in unlike[:index])


def configured(given: Mapping[str, Any], variables: Mapping[str, str] | None = None) -> Scope:
    """With these fields laid over those that the user gave, and these variables in the environment."""

    @contextlib.contextmanager
    def scope(call: BuildCall) -> Iterator[BuildCall]:
        with _in_environment(variables or {}):
            over = {
                name: {**(getattr(call.given, name) or {}), **value} if FIELDS[name].has_parts else value
                for name, value in given.items()
            }
            asked = CompilationConfig.of({**call.given.given(), **over})
            config = resolve(asked, rules=device_rules(call.target.name), environment=environment())
            check_options(config.inductor_compile_config)
            yield replace(call, config=config, given=asked)

    return scope


@contextlib.contextmanager
def _in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    now = process_variables()
    before = {name: now.get(name) for name in variables}
    now.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                now.pop(name, None)
            else:
                now[name] = value


def _passes(call: BuildCall) -> Iterator[Perturbation]:
    for entry in CATALOGUE:
        name = entry.kind.name
        was = call.config.passes.get(name, call.config.level >= (1 if entry.canonical else 2))
        for value in (False, {IF_PRESENT: True}):
            if bool(value) != bool(was):
                given = {"passes": {name: value}}
                yield Perturbation(f"pass.{name}", _words(was), _words(value), configured(given), "graph")
        options = was if isinstance(was, Mapping) else {}
        for option in dataclasses.fields(entry.kind):
            before = options.get(option.name, option.default)
            after = _other_option(before)
            given = {"passes": {name: {**options, option.name: after, IF_PRESENT: True}}}
            title = f"pass.{name}.{option.name}"
            yield Perturbation(title, _words(before), _words(after), configured(given), "graph")


def _other_option(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value // 2 if isinstance(value, int) else value * 2 if isinstance(value, float) else None


def _variables() -> Iterator[Perturbation]:
    """Variables that torch reads when it is imported can't be changed here: Inductor's options stand for them."""
    folder = Path(tempfile.gettempdir()) / "onegraph-audit"
    values = {
        "ONEGRAPH_CACHE_ROOT": str(folder / "root"),
        "ONEGRAPH_CACHE_BASE": str(folder / "base"),
        "ONEGRAPH_CACHE_KEY_FILE": str(folder / "key"),
        "ONEGRAPH_DISABLE_COMPILE_CACHE": "1",
        "ONEGRAPH_COMPILATION_CONFIG": json.dumps({"level": 1}),
        "ONEGRAPH_COMPILE_CACHE_SAVE_FORMAT": "unpacked",
        "ONEGRAPH_ATTENTION": "torch",
        "ONEGRAPH_LOG_LEVEL": "DEBUG",
        "ONEGRAPH_ALLOW_UNTESTED_TORCH": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "OMP_NUM_THREADS": "1",
    }
    assert set(VARIABLES) <= set(values)
    for name, value in values.items():
        was = process_variables().get(name, "")
        affects = "graph" if name == "ONEGRAPH_COMPILATION_CONFIG" else "nothing"
        yield Perturbation(f"env.{name}", was, value, configured({}, {name: value}), affects)


def _torch_switches(call: BuildCall) -> Iterator[Perturbation]:
    device = call.target.name
    autocast = torch.is_autocast_enabled(device)
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    dtype = torch.get_default_dtype()
    other_dtype = torch.float64 if dtype is torch.float32 else torch.float32
    other_precision = "high" if precision != "high" else "highest"
    fills = torch.utils.deterministic.fill_uninitialized_memory
    onednn = torch.backends.mkldnn.enabled  # a name of torch's

    def put_fills(value: bool) -> None:
        torch.utils.deterministic.fill_uninitialized_memory = value

    def put_onednn(value: bool) -> None:
        torch.backends.mkldnn.set_flags(value)

    changes: dict[str, tuple[Any, Any, Callable[[Any], Any]]] = {
        "default_dtype": (dtype, other_dtype, torch.set_default_dtype),
        "float32_matmul_precision": (precision, other_precision, torch.set_float32_matmul_precision),
        "deterministic": (deterministic, not deterministic, torch.use_deterministic_algorithms),
        "fill_uninitialized_memory": (fills, not fills, put_fills),
        "num_threads": (threads, threads + 1, torch.set_num_threads),
        "mkldnn": (onednn, not onednn, put_onednn),
        "autocast": (autocast, not autocast, lambda value: torch.set_autocast_enabled(device, value)),
        "grad_mode": (torch.is_grad_enabled(), not torch.is_grad_enabled(), torch.set_grad_enabled),
    }
    for name, (was, value, put) in changes.items():
        yield Perturbation(f"torch.{name}", str(was), str(value), replaced(was, value, put))


def replaced(was: Any, value: Any, put: Callable[[Any], Any]) -> Scope:
    """With `put(value)`; `put(was)` undoes it."""

    @contextlib.contextmanager
    def scope(call: BuildCall) -> Iterator[BuildCall]:
        try:
            put(value)
            yield call
        finally:
            put(was)

    return scope


def _inductor_options() -> Iterator[Perturbation]:
    for name, was in switches().items():

        @contextlib.contextmanager
        def scope(call: BuildCall, name: str = name, value: bool = not was) -> Iterator[BuildCall]:
            with switched(name, value):
                yield call

        yield Perturbation(f"inductor.{name}", str(was), str(not was), scope, recaptures=False)


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
