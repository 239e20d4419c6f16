"""The library's entry points: compile a module, decorate a class, or be the backend of torch.compile.

Thin: they resolve the configuration in the caller's thread and leave the work to the pipeline.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch

from onegraph.backend import compile_dynamo_graph
from onegraph.compiled import Built, CompiledModel
from onegraph.config.compilation import CompilationConfig, CompilationMode
from onegraph.config.resolve import ResolvedConfig, resolve
from onegraph.env import environment
from onegraph.errors import ArtifactError, ConfigError
from onegraph.log import get_logger
from onegraph.numerics.oracle import SizeCheck
from onegraph.pipeline import Observer, build, empty_explanation
from onegraph.size_check import check_sizes
from onegraph.store.store import Store
from onegraph.targets import device_rules, target_for

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
    observer: Observer | None = None,
) -> CompiledModel:
    """Compiles a module, method or function for inference, for every size in the declared ranges.

    Nothing is compiled before the first call or `warm_up`. `dynamic_shapes` is as in torch.export: argument
    names to `{dim: Dim}`. `config` is a CompilationConfig, a dict of its fields, or a level 0..3. `name` is
    what `explain` calls the model. The module is not changed, and keeps working as it is.

    Captured Python state is compared before every call; with `own_module`, the caller promises to say
    `check_state()` after changing the module, and calls skip it; with `config.freeze` nothing is compared.

    Raises ConfigError for a configuration that is wrong or can't be honoured.
    """
    if not callable(module):
        raise ConfigError(f"{module!r:.80} can't be called, so it can't be compiled")
    resolved = resolve(
        CompilationConfig.of(config),
        rules=device_rules(device_type_of(module)),
        environment=environment(),
        enforce_eager=enforce_eager,
    )
    _check_inductor_options(resolved)
    state_checked: Literal["call", "event"] = "event" if own_module else "call"
    title = str(name or getattr(module, "__qualname__", type(module).__name__))

    def build_entry(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
        if resolved.mode is CompilationMode.NONE:
            return Built(module, empty_explanation(title, resolved))
        if resolved.mode is CompilationMode.STOCK_TORCH_COMPILE:
            return Built(_stock_compile(module, resolved), empty_explanation(title, resolved))
        built = build(
            module,
            args,
            kwargs,
            name=title,
            dynamic_shapes=dynamic_shapes,
            config=resolved,
            target=target_for(device_type_of(module, args, kwargs)),
            store=open_store(),
            observer=observer,
            state_checked=state_checked,
        )

        def check(compiled: Any, args: tuple[Any, ...], kwargs: dict[str, Any], num_sizes: int) -> Iterator[SizeCheck]:
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

        return replace(built, check=check)

    return CompiledModel(
        module,
        build_entry,
        lambda: empty_explanation(title, resolved),
        on_state_change=resolved.on_state_change,
        state_checked=state_checked,
    )


def _check_inductor_options(resolved: ResolvedConfig) -> None:
    if resolved.inductor_compile_config:
        from onegraph.torch_compat.inductor import check_options  # imports Inductor, which takes seconds

        check_options(resolved.inductor_compile_config)


def _stock_compile(module: Any, resolved: ResolvedConfig) -> Callable[..., Any]:
    options = dict(resolved.inductor_compile_config)
    if resolved.backend == "inductor":
        stock: Callable[..., Any] = torch.compile(module, options=options or None)
    else:
        stock = torch.compile(module, backend=resolved.backend)
    return stock


def device_type_of(module: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> str:
    """The device type of the module's weights, else of its tensor arguments, else the CPU."""
    owner = getattr(module, "__self__", module)
    if isinstance(owner, torch.nn.Module):
        for tensor in (*owner.parameters(), *owner.buffers()):
            return str(tensor.device.type)
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, torch.Tensor):
            return str(value.device.type)
    return "cpu"


def open_store() -> Store | None:
    """The compile cache as the environment has it; None where it is off.

    A default root that can't be written is left out with one warning; one that was asked for is an ArtifactError.
    """
    current = environment()
    if current.disable_compile_cache:
        return None
    store = Store(current.cache_root)
    try:
        store.open_root()
    except ArtifactError as error:
        if current.cache_root_is_explicit:
            raise
        log.warning("%s; compiled artifacts won't be kept", str(error).splitlines()[0])
        return None
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
    resolved = resolve(
        CompilationConfig.of(options),
        rules=device_rules(device_type_of(graph_module, tuple(example_inputs))),
        environment=environment(),
    )
    return compile_dynamo_graph(graph_module, example_inputs, resolved, open_store())
