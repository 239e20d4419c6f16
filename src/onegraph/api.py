"""The library's entry points: compile a module, decorate a class, or be the backend of torch.compile.

Thin: they resolve the configuration in the caller's thread and leave the work to the pipeline.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from onegraph.build import build, empty_explanation, refuse_other_machine
from onegraph.build_call import BuildCall, Observer, SavedBuild, Stages
from onegraph.build_record import Asked, BuildRecord, shapes_of
from onegraph.built import Built
from onegraph.capture.portable import loaded
from onegraph.compiled import CompiledModel
from onegraph.config.compilation import CompilationConfig, CompilationMode, CUDAGraphMode
from onegraph.config.resolve import ResolvedConfig, resolve
from onegraph.env import environment
from onegraph.errors import ArtifactError, ConfigError
from onegraph.ir.target import Target
from onegraph.log import get_logger
from onegraph.numerics.oracle import SizeCheck
from onegraph.recorded_ahead import recorded_ahead
from onegraph.store.index import CONTENTS as TRACE
from onegraph.store.lookup import Lookup
from onegraph.store.store import Store
from onegraph.store.transfer import import_archive
from onegraph.targets import common_device, device_rules, target_for, target_like
from onegraph.weights import WeightStore

log = get_logger(__name__)

ConfigLike = CompilationConfig | Mapping[str, Any] | int | str | None
ModuleClass = TypeVar("ModuleClass", bound=type[torch.nn.Module])


def compile(  # noqa: A001 - the name that users expect beside torch.compile
    module: Any,
    *,
    dynamic_shapes: Any = None,
    config: ConfigLike = None,
    name: str | None = None,
    enforce_eager: bool = False,
    own_module: bool = False,
    own_weights: bool = False,
) -> CompiledModel:
    """Compiles a module, method or function for inference, for every size in the declared ranges.

    Nothing is compiled before the first call or `warm_up`. `dynamic_shapes` is as in torch.export: argument
    names to `{dim: Dim}`. `config` is a CompilationConfig, a dict of its fields, or a level 0..3. `name` is
    what `explain` calls the model. The module is not changed, and keeps working as it is.

    With `own_weights` the module is yours to change: compiling, and the first call after a weight was replaced, may
    merge weights, so that parameters become views of one storage. They stay the same Parameters with the same values.
    Memory that something outside of the module shares with them is theirs no longer, and nothing else may run the
    module meanwhile.

    Captured Python state is compared before every call; with `own_module`, the caller promises to say
    `check_state()` after changing the module, and calls skip it; with `config.freeze` nothing is compared.

    Raises ConfigError for a configuration that is wrong or can't be honoured.
    """
    return compiled_model(
        module,
        dynamic_shapes=dynamic_shapes,
        config=config,
        name=name,
        enforce_eager=enforce_eager,
        own_module=own_module,
        own_weights=own_weights,
    )


def compiled_model(
    module: Any,
    *,
    dynamic_shapes: Any,
    config: ConfigLike,
    name: str | None,
    own_module: bool,
    own_weights: bool,
    enforce_eager: bool = False,
    observer: Observer | None = None,
    lookup: Lookup | None = None,
    saved: Saved | None = None,
    target: Target | None = None,
    records_by_hand: bool = False,
    made_observer: Callable[[Sequence[Any]], None] | None = None,
) -> CompiledModel:
    """As `compile`; `observer` is told of the stages. With `records_by_hand` only `record` records.

    With a `lookup` nothing is compiled: it is asked what it has, and pieces run op by op. What was `saved` is taken at
    the first call, or refused.

    With a `made_observer` the module is traced whatever the index has; see `BuildCall`.

    `target` is what to compile for, if it isn't this process on the module's device. If it doesn't run, the result is
    there to be saved, by `warm_up` and `save`, and the values of the module's weights are never read.
    """
    if not callable(module):
        raise ConfigError(f"{module!r:.80} can't be called, so it can't be compiled")
    given = CompilationConfig.of(config)
    resolved = resolve(
        given,
        rules=device_rules(device_type_of(module), batches=records_by_hand),
        environment=environment(),
        enforce_eager=enforce_eager,
    )
    if saved is not None and resolved.mode not in (CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.ONEGRAPH):
        raise ConfigError(
            f"{saved.build.file} has what was compiled, and with mode={resolved.mode.name} nothing of ours is compiled",
            where="artifact",
            hint="leave the mode, -O0 or enforce_eager out, or the artifact",
        )
    if records_by_hand and resolved.cudagraph_padding:
        raise ConfigError(
            f"cudagraph_padding ({resolved.why['cudagraph_padding']}) is for library calls: an engine knows what its "
            "padding has to be",
            where="configuration",
            hint="leave it out",
        )
    _check_inductor_options(resolved)
    _check_passes(resolved)
    owned = WeightStore(_owner(module)) if own_weights else None
    state_checked: Literal["call", "event"] = "event" if own_module else "call"
    title = str(name or getattr(module, "__qualname__", type(module).__name__))

    first = [] if saved is None else [saved.build]  # what is captured later is captured here

    def build_entry(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
        if resolved.mode is CompilationMode.STOCK_TORCH_COMPILE:
            return Built(_stock_compile(module, resolved), empty_explanation(title, resolved))
        is_uncompiled = resolved.mode is CompilationMode.NONE
        if is_uncompiled and resolved.cudagraph_mode is CUDAGraphMode.NONE:
            return Built(module, empty_explanation(title, resolved))
        call = BuildCall(
            module=module,
            args=args,
            kwargs=kwargs,
            name=title,
            dynamic_shapes=dynamic_shapes,
            config=resolved,
            target=target or _target(device_type_of(module, args, kwargs), saved),
            store=lookup or (open_store() if saved is None else saved.store),
            given=given,
            saved=first.pop() if first else None,
            stages=Stages(observer),
            state_checked=state_checked,
            owned=owned,
            made_observer=made_observer,
        )
        if not is_uncompiled:
            return finished(build(call))
        from onegraph.uncompiled import build_uncompiled  # this, and what it needs, is rarely used

        recorder, nothing = call.recorder(), empty_explanation(title, resolved)
        if recorder is None:
            return Built(module, nothing)
        return finished(build_uncompiled(call, recorder, nothing, restores=not records_by_hand))

    def finished(built: Built) -> Built:
        """The build with what needs the module and the configuration; also after a piece of it has fallen back."""
        fallback = built.fallback
        for recordings in built.recordings:
            recordings.pad(resolved.cudagraph_padding, built.explanation.dims, built.slots)

        def check(compiled: Any, args: tuple[Any, ...], kwargs: dict[str, Any], num_sizes: int) -> Iterator[SizeCheck]:
            from onegraph.size_check import check_sizes  # this, and what it needs, is rarely used

            return check_sizes(
                compiled,
                module,
                args,
                kwargs,
                dynamic_shapes=dynamic_shapes,
                max_size=resolved.max_num_tokens,
                constraints=built.explanation.ledger.shapes,
                num_sizes=num_sizes,
            )

        return replace(
            built,
            check=check,
            fallback=None if fallback is None else lambda *given: finished(fallback(*given)),
            **({} if records_by_hand else recorded_ahead(module, built, dynamic_shapes, resolved)),
        )

    return CompiledModel(
        module,
        build_entry,
        lambda: empty_explanation(title, resolved),
        on_state_change=resolved.on_state_change,
        state_checked=state_checked,
    )


def load(file: str | os.PathLike[str], module: Any, *, name: str | None = None) -> CompiledModel:
    """The compiled model that `CompiledModel.save` wrote, for the same module or function, which isn't traced again.

    The file holds code that will run: load what you trust. All of it is verified before any is used (and its
    signatures, where ONEGRAPH_CACHE_KEY_FILE is set), and put into the compile cache. Dynamic shapes, configuration and
    what was promised of the module are those of the saved model.

    Raises ArtifactError for a file that is bad; and at the first call (or `warm_up`) for a module, call, configuration
    or machine that it isn't for, with what differs. Later changes of Python state are captured anew, as ever.
    """
    saved = open_saved(Path(file))
    return compiled_model(
        module,
        dynamic_shapes=shapes_of(saved.asked.dynamic_shapes),
        config=saved.asked.config,
        name=name,
        own_module=saved.asked.own_module,
        own_weights=saved.asked.own_weights,
        saved=saved,
    )


@dataclass(frozen=True)
class Saved:
    """A saved file's build, what the user had asked for, and where its entries are now, which `held` keeps."""

    build: SavedBuild
    asked: Asked
    store: Store
    held: contextlib.ExitStack

    def target(self, device_type: str) -> Target:
        """What loads its code on a device. Raises ArtifactError where nothing here does, with what differs."""
        target = target_like(device_type, self.build.factors.get("machine", {}).get("target", {}))
        refuse_other_machine(self.build, target)
        return target


def _target(device_type: str, saved: Saved | None) -> Target:
    return target_for(device_type) if saved is None else saved.target(device_type)


def open_saved(file: Path) -> Saved:
    """Verifies a file that `CompiledModel.save` wrote, and puts it into the compile cache. Raises ArtifactError."""
    store = open_store()
    with contextlib.ExitStack() as held:
        if store is None:  # the compile cache is off, or can't be used
            store = Store(Path(held.enter_context(tempfile.TemporaryDirectory(prefix="onegraph-load-"))))
            store.open_root()
        record = _saved_record(store, file)
        weights = record.regions[0].trace.weights
        return Saved(SavedBuild(str(file), record.factors, weights), record.asked, store, held.pop_all())


def _saved_record(store: Store, file: Path) -> BuildRecord:
    contents = import_archive(store, file)
    traces = [one.key for one in contents.entries if one.kind == "trace"]
    stored = store.read(traces[0]) if len(traces) == 1 else None
    try:
        record = None if stored is None else loaded(stored.files[TRACE].read_bytes())
    except Exception as error:
        raise ArtifactError(
            f"{file} can't be read here: {error}", where=str(file), hint="save it again here"
        ) from error
    if not isinstance(record, BuildRecord):
        hint = "onegraph.load takes what CompiledModel.save wrote; `onegraph cache import` takes exports"
        raise ArtifactError(f"{file} has {len(traces)} builds in it, not one", where=str(file), hint=hint)
    return record


def _owner(module: Any) -> torch.nn.Module:
    """The module that holds the weights: itself, or that of a method."""
    owner = getattr(module, "__self__", module)
    if not isinstance(owner, torch.nn.Module):
        raise ConfigError(
            f"own_weights, but {module!r:.80} is no module", hint="compile an nn.Module, or a method of one"
        )
    return owner


def _check_inductor_options(resolved: ResolvedConfig) -> None:
    if resolved.inductor_compile_config:
        from onegraph.torch_compat.inductor import check_options  # imports Inductor, which takes seconds

        check_options(resolved.inductor_compile_config)


def _check_passes(resolved: ResolvedConfig) -> None:
    if resolved.passes or resolved.extra_passes:
        from onegraph.passes.catalogue import choose_passes  # imports what tracing needs, which takes seconds

        choose_passes(resolved)


def _stock_compile(module: Any, resolved: ResolvedConfig) -> Callable[..., Any]:
    options = dict(resolved.inductor_compile_config)
    if resolved.backend == "inductor":
        stock: Callable[..., Any] = torch.compile(module, options=options or None)
    else:
        stock = torch.compile(module, backend=resolved.backend)
    return stock


def device_type_of(module: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> str:
    """The device type to compile for: that of the module's weights and tensor arguments; the CPU where there are none.

    Where some lie on the CPU and others on another device, the other one.
    """
    owner = getattr(module, "__self__", module)
    tensors = [*owner.parameters(), *owner.buffers()] if isinstance(owner, torch.nn.Module) else []
    tensors += [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, torch.Tensor)]
    return common_device(tensor.device.type for tensor in tensors)


def open_store() -> Store | None:
    """The compile cache as the environment has it; None where it is off.

    A default root that can't be written is left out with one warning; one that was asked for is an ArtifactError, and
    so is a base or a key file that can't be used.
    """
    current = environment()
    if current.disable_compile_cache:
        return None
    store = Store.configured(current)
    store.open_base()
    try:
        store.open_root()
    except ArtifactError as error:
        if current.cache_root_is_explicit:
            raise
        log.warning("%s; compiled artifacts won't be kept", str(error).splitlines()[0])
        store.keeps = False
        return None if store.base is None else store
    return store


class _InstanceSlot:
    """Holds the compiled model of one decorated instance. A copy or pickle of the instance starts without one.

    `owner` is the id of the instance: a shallow copy brings this same slot along, and it isn't the copy's.
    """

    def __init__(self, owner: int | None = None) -> None:
        self.owner = owner
        self.compiled: CompiledModel | None = None
        self.making = threading.Lock()

    def __deepcopy__(self, memo: Any) -> _InstanceSlot:
        return _InstanceSlot()

    def __reduce__(self) -> Any:
        return (_InstanceSlot, ())


def support_torch_compile(
    *, dynamic_shapes: Any = None, config: ConfigLike = None
) -> Callable[[ModuleClass], ModuleClass]:
    """A decorator for an nn.Module class: each instance's `forward` compiles itself at its first call.

    `dynamic_shapes` and `config` are as for `compile`. `instance.onegraph_compiled` is the instance's
    CompiledModel, for `explain` and `warm_up`. Hooks run around the compiled forward. Under another tracer
    (torch.compile, torch.export, an outer onegraph.compile) the class behaves as if it weren't decorated.
    """

    def decorate(cls: ModuleClass) -> ModuleClass:
        if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
            raise ConfigError(f"support_torch_compile decorates classes of nn.Module, not {cls!r}")
        original = cls.forward
        place = f"_onegraph_slot_{cls.__module__}.{cls.__qualname__}"  # a decorated base class has its own

        def compiled_of(self: torch.nn.Module) -> CompiledModel:
            slot: _InstanceSlot = self.__dict__.setdefault(place, _InstanceSlot(id(self)))
            if slot.owner != id(self):
                slot = self.__dict__[place] = _InstanceSlot(id(self))
            with slot.making:
                if slot.compiled is None:
                    slot.compiled = compile(
                        types.MethodType(original, self),
                        dynamic_shapes=dynamic_shapes,
                        config=config,
                        name=type(self).__qualname__,
                    )
            return slot.compiled

        @functools.wraps(original)
        def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(self, *args, **kwargs)
            slot = self.__dict__.get(place)
            ready = slot is not None and slot.owner == id(self) and slot.compiled is not None
            compiled = slot.compiled if ready else compiled_of(self)
            return compiled(*args, **kwargs)

        cls.forward = forward  # type: ignore[method-assign]
        cls.onegraph_compiled = property(compiled_of)  # type: ignore[attr-defined]
        return cls

    return decorate


def torch_compile_backend(
    graph_module: torch.fx.GraphModule, example_inputs: list[Any], *, options: ConfigLike = None
) -> Callable[..., Any]:
    """The backend that `torch.compile(module, backend="onegraph")` finds; `options` are CompilationConfig's fields.

    Dynamo keeps its own guards, graph breaks and dynamic sizes; each graph is split, compiled and stored.
    """
    from onegraph.backend import compile_dynamo_graph  # imports what compiling needs, which takes seconds

    resolved = resolve(
        CompilationConfig.of(options),
        rules=device_rules(device_type_of(graph_module, tuple(example_inputs))),
        environment=environment(),
    )
    return compile_dynamo_graph(graph_module, example_inputs, resolved, open_store())
