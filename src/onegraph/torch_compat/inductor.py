"""Inductor as a source-to-source compiler: a graph in, the wrapper's Python and the kernels' sources out.

Neither runs a kernel's compiler nor loads anything: building and loading belong to the target. Where Inductor's
output can't be taken apart so, the callable that it made in this process is given instead, with the reason.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch._functorch._aot_autograd.schemas import MutationType, OutputType
from torch._inductor import async_compile, compile_fx
from torch._inductor import utils as inductor_utils
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.graph import GraphLowering
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.virtualized import V
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from onegraph.errors import ConfigError, nearest
from onegraph.ir.artifact import OutputAlias, OutputLayout
from onegraph.ir.fx_nodes import value_of
from onegraph.ir.target import KernelSource
from onegraph.torch_compat.custom_hooks import HOOKS
from onegraph.torch_compat.overlap import overlapping
from onegraph.torch_compat.shapes import RawCondition, dense_order, squeezed_sizes
from onegraph.torch_compat.toolchain import toolchain_as_declared
from onegraph.torch_compat.view_places import view_place

_FIRST_PASS = "joint_custom_pre_pass"
ALIGNMENT: int = inductor_utils.ALIGNMENT
"""Bytes: what kernels for GPUs take for granted of inputs' addresses, where the traced inputs had it."""
_FRESH = (OutputType.non_alias, OutputType.unsafe_view_alias, OutputType.custom_function_view)
"""Outputs with memory of their own."""


@dataclass(frozen=True)
class InductorOutput:
    """What Inductor made of a graph.

    `source` is the wrapper as Inductor wrote it; `kernels` are what it would have built; `constants` are
    tensors that the wrapper reads by name; `aliases` are the outputs that share memory with an input; `layouts` are
    those of outputs that Inductor may lay out otherwise than the graph says; `aligned_inputs` are the inputs whose
    data the kernels take to begin at a multiple of ALIGNMENT bytes;
    `conditions` are those on sizes that torch relies on and doesn't tell. With `not_portable` set, only `callable`
    is usable, after `link` gave it its built kernels by their names; the text says why.
    """

    source: str
    kernels: tuple[KernelSource, ...]
    constants: dict[str, torch.Tensor]
    aliases: tuple[OutputAlias, ...]
    callable: Callable[..., Any] | None
    not_portable: str | None
    link: Callable[[Mapping[str, Any]], None] | None = None
    mutates_inputs: bool = True
    conditions: tuple[RawCondition, ...] = ()
    layouts: tuple[OutputLayout, ...] = ()
    aligned_inputs: tuple[int, ...] = ()


def compile_graph(
    graph_module: torch.fx.GraphModule,
    fake_inputs: list[Any],
    fake_mode: Any,
    options: dict[str, Any],
    device_types: tuple[str, ...],
) -> InductorOutput:
    """Runs AOTAutograd and Inductor on a flat graph (placeholders in, tuple out) under no_grad.

    Kernels of other devices than `device_types` are left to Inductor.
    Must run inside `dynamo.compile_scope`. The graph module is consumed. Raises what torch raises.
    """
    results = [value_of(one) if isinstance(one, torch.fx.Node) else None for one in _outputs(graph_module.graph)]
    collected: list[KernelSource] = []
    unbuilt: dict[str, _Unbuilt] = {}
    graphs: list[Any] = []
    conditions: list[RawCondition] = []
    memory: list[torch.fx.Node] = []
    num_inputs: list[int] = []
    users = options.get(_FIRST_PASS, getattr(torch._inductor.config, _FIRST_PASS))

    def first_pass(graph: torch.fx.Graph) -> None:
        memory[:] = map(_viewed, _outputs(graph))
        for users_pass in users if isinstance(users, list | tuple) else [users] if users is not None else []:
            users_pass(graph)

    def inner_compile(gm: Any, example_inputs: Any, **kwargs: Any) -> Any:
        _keep_outputs_apart(gm, memory)
        num_inputs.append(len(example_inputs))
        conditions.extend(squeezed_sizes(gm))
        output = compile_fx.compile_fx_inner(gm, example_inputs, **kwargs)
        graphs.append(output)
        return output

    context = torch._guards.TracingContext(fake_mode)
    collecting = _collect_kernels(collected, unbuilt)
    tracing = torch._guards.tracing(context)
    with torch.no_grad(), tracing, collecting, _fusing_by_hints(), _origins_told(), toolchain_as_declared():
        function = compile_fx.compile_fx(
            graph_module, fake_inputs, inner_compile=inner_compile, config_patches={**options, _FIRST_PASS: first_pass}
        )
        metadata = context.fw_metadata
    mutates_inputs = metadata is None or any(info.mutates_data for info in metadata.input_info)
    reason = _why_not_portable(graphs, metadata, fake_inputs, device_types)
    if reason is None and num_inputs != [len(fake_inputs)]:
        reason = "AOTAutograd hands the compiled graph other inputs than it is given"
    if reason is not None:

        def link(built: Mapping[str, Any]) -> None:
            for name, kernel in unbuilt.items():
                kernel.built = built[name]

        return InductorOutput(
            "",
            tuple(collected),
            {},
            (),
            function,
            reason,
            link,
            mutates_inputs,
            tuple(conditions),
            tuple(_layouts(metadata, results)),
        )
    return InductorOutput(
        source=graphs[0].source_code,
        kernels=tuple(collected),
        constants=dict(graphs[0].constants or {}),
        aliases=tuple(_aliases(metadata, results, fake_inputs, fake_mode.shape_env)),
        callable=None,
        not_portable=None,
        mutates_inputs=mutates_inputs,
        conditions=tuple(conditions),
        layouts=tuple(_layouts(metadata, results)),
        aligned_inputs=tuple(graphs[0].inputs_to_check),
    )


def _layouts(metadata: Any, results: list[Any]) -> Iterator[OutputLayout]:
    """Inductor keeps the strides of outputs, but for those in which an unbacked size occurs (torch 2.13).

    The next piece, an op between pieces and the caller rely on them as the graph says them.
    """
    infos = [] if metadata is None else metadata.output_info
    for index, (info, value) in enumerate(zip(infos, results, strict=False)):
        fresh = info.output_type in _FRESH and isinstance(value, torch.Tensor) and value.layout == torch.strided
        if fresh and free_unbacked_symbols(value.stride()) and (order := dense_order(value)) is not None:
            yield OutputLayout(index, order)


def _keep_outputs_apart(gm: torch.fx.GraphModule, memory: list[torch.fx.Node]) -> None:
    """Copies outputs that passes have put into the memory of an input or of another output.

    `memory` are the nodes whose memory the outputs showed before. Inductor's joint passes take `x + zeros` for `x`,
    with no look at what is an output (torch 2.13).
    """
    (output,) = gm.graph.find_nodes(op="output")
    values = _outputs(gm.graph)
    taken: dict[Any, Any] = {}
    copies = {}
    for index, (value, before) in enumerate(zip(values, memory, strict=True)):
        now = _viewed(value)
        merged = isinstance(now, torch.fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)
        if merged and (taken.setdefault(now, before) is not before or (now.op, before.op).count("placeholder") == 1):
            with gm.graph.inserting_before(output):
                copied = gm.graph.call_function(torch.ops.aten.clone.default, (value,))
            copied.meta = dict(value.meta, val=value.meta["val"].clone())
            copies[index] = copied
    if copies:
        output.args = ([copies.get(index, value) for index, value in enumerate(values)],)
        gm.recompile()


def _outputs(graph: torch.fx.Graph) -> list[Any]:
    (output,) = graph.find_nodes(op="output")
    return list(output.args[0])


def _viewed(node: Any) -> Any:
    """The node whose memory a chain of views shows; what isn't a node is itself."""
    while (
        isinstance(node, torch.fx.Node)
        and isinstance(node.target, torch._ops.OpOverload)
        and node.args
        and isinstance(node.args[0], torch.fx.Node)
    ):
        alias = node.target._schema.arguments[0].alias_info
        if alias is None or alias.is_write:
            break
        node = node.args[0]
    return node


class _Unbuilt:
    """Stands in a wrapper's namespace for a kernel that is built later."""

    def __init__(self) -> None:
        self.built: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> None:
        self._kernel()(*args)

    def run(self, *args: Any, **kwargs: Any) -> None:
        """How a wrapper calls a Triton kernel."""
        self._kernel().run(*args, **kwargs)

    def _kernel(self) -> Any:
        if self.built is None:
            raise AssertionError("a kernel was called before it was built")
        return self.built


@contextlib.contextmanager
def _collect_kernels(collected: list[KernelSource], unbuilt: dict[str, _Unbuilt]) -> Iterator[None]:
    compiler = async_compile.AsyncCompile
    originals = compiler.cpp_pybinding, compiler.triton

    def collect(argtypes: tuple[str, ...], *rest: str) -> _Unbuilt:
        # What the wrapper calls it is known only to its text; `onegraph.compilers.wrapper` matches them in order.
        name = f"kernel_{hashlib.sha256(repr((argtypes, *rest)).encode()).hexdigest()[:16]}"
        collected.append(KernelSource(name, argtypes, *rest))
        return unbuilt.setdefault(name, _Unbuilt())

    def cpp_pybinding(self: Any, argtypes: list[str], source_code: str) -> Any:
        return collect(tuple(argtypes), source_code)

    def triton(self: Any, kernel_name: str, source_code: str, device_str: str = "") -> Any:
        return collect((), source_code, "triton", kernel_name)

    compiler.cpp_pybinding, compiler.triton = cpp_pybinding, triton  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        compiler.cpp_pybinding, compiler.triton = originals  # type: ignore[method-assign]


@contextlib.contextmanager
def _fusing_by_hints() -> Iterator[None]:
    """Inside, data of an unbacked size weighs what its hint says, where Inductor decides what to fuse.

    Torch 2.11 gives it no weight at all, and then fuses no reduction with what follows; 2.13 does as here.
    """
    if hasattr(SizeVarAllocator, "all_unbacked_explicitly_hinted"):
        yield
        return
    original = GraphLowering.get_dep_size_hint

    def get_dep_size_hint(self: Any, dep: Any, count_bytes: bool = True) -> int:
        with contextlib.suppress(KeyError, NotImplementedError):
            symbols = free_unbacked_symbols(dep.get_numel())
            if symbols and symbols <= set(self.sizevars.var_to_hint_override):
                return int(dep.numbytes_hint() if count_bytes else dep.numel_hint())
        return int(original(self, dep, count_bytes))

    GraphLowering.get_dep_size_hint = get_dep_size_hint  # type: ignore[method-assign]
    try:
        yield
    finally:
        GraphLowering.get_dep_size_hint = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _origins_told() -> Iterator[None]:
    """Inside, a comment above each call of a C++ kernel names the graph's nodes, as above calls of all others."""
    original = CppScheduling.codegen_comment

    def codegen_comment(self: Any, node_schedule: Any, kernel_name: str | None = None) -> None:
        wrapper = V.graph.wrapper_code
        origins, _ = inductor_utils.get_kernel_metadata(list(node_schedule), wrapper)
        wrapper.make_comment(origins)
        original(self, node_schedule, kernel_name)

    CppScheduling.codegen_comment = codegen_comment  # type: ignore[method-assign]
    try:
        yield
    finally:
        CppScheduling.codegen_comment = original  # type: ignore[method-assign]


def _why_not_portable(
    graphs: list[Any], metadata: Any, fake_inputs: list[Any], device_types: tuple[str, ...]
) -> str | None:
    if len(graphs) != 1 or not getattr(graphs[0], "source_code", ""):
        return f"Inductor made {len(graphs)} graphs of one piece"
    if metadata is None:
        return "AOTAutograd left no description of the graph"
    for index, info in enumerate(metadata.input_info):
        if info.mutates_metadata or info.mutates_storage_metadata:
            return f"input {index} has its shape, strides or storage changed in place"
        if info.mutates_data and info.mutation_type != MutationType.MUTATED_IN_GRAPH:
            return f"input {index} is changed by AOTAutograd's wrapper, outside the graph"
    aliasing = (OutputType.alias_of_input, OutputType.is_input)
    for index, info in enumerate(metadata.output_info):
        if info.output_type not in _FRESH + aliasing:
            return f"output {index} is {info.output_type.name} of another output"
        if info.requires_grad:
            return f"output {index} requires a gradient"
    if metadata.tokens:
        return "the graph has ordered side effects"
    shared = _mutated_overlap(metadata, fake_inputs)
    if shared is not None:
        return shared
    if foreign := set(getattr(graphs[0], "device_types", None) or ()) - set(device_types):
        return f"it has kernels for {', '.join(sorted(foreign))}"
    if getattr(graphs[0], "torchbind_constants", None):
        return "the graph holds TorchBind objects"
    return None


def _mutated_overlap(metadata: Any, fake_inputs: list[Any]) -> str | None:
    """AOTAutograd rewrites calls whose mutated inputs overlap others; that wrapper isn't portable."""
    tensors = [(index, value) for index, value in enumerate(fake_inputs) if isinstance(value, torch.Tensor)]
    for index, value in tensors:
        if metadata.input_info[index].mutates_data:
            for other, other_value in tensors:
                if other != index and overlapping([value, other_value]) is not None:
                    return f"inputs {index} and {other} overlap in memory and one of them is changed"
    return None


def _aliases(metadata: Any, results: list[Any], fake_inputs: list[Any], shape_env: Any) -> Iterator[OutputAlias]:
    """Where an input is changed, compiled code gives views of memory of its own: their place there says nothing.

    Raises NotImplementedError for one whose place isn't known.
    """
    for index, (info, value) in enumerate(zip(metadata.output_info, results, strict=False)):
        if info.output_type == OutputType.is_input:
            yield OutputAlias(index, info.base_idx, is_view=False)
        elif info.output_type == OutputType.alias_of_input:
            place = view_place(value, fake_inputs[info.base_idx], fake_inputs, shape_env)
            if place is None and metadata.input_info[info.base_idx].mutates_data:
                raise NotImplementedError(
                    f"output {index} is a view of a changed input, at a place that no input tells"
                )
            yield OutputAlias(index, info.base_idx, is_view=True, place=place)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ConfigError for an option that Inductor doesn't have, with the nearest one that it has."""
    known = list(torch._inductor.config.get_config_copy())
    for name in options:
        if name not in known:
            raise ConfigError(
                f"Inductor has no option {name!r}",
                where="inductor_compile_config",
                hint=nearest(name, known),
            )


def portable_config(options: dict[str, Any]) -> dict[str, Any]:
    """Inductor's and AOTAutograd's whole configuration that can change what is generated, JSON-able.

    With what torch calls private: `_use_fp64_for_unbacked_floats` changes code too.

    `options`, which must exist, are patched on top of what is in force.
    """
    with torch._inductor.config.patch(options):
        inductor = torch._inductor.config.save_config_portable(ignore_private_configs=False)
    functorch = torch._functorch.config.save_config_portable(ignore_private_configs=False)
    for hook in HOOKS:  # have identities of their own
        inductor.pop(hook, None)
    return {"inductor": _plain(inductor), "functorch": _plain(functorch)}


def _plain(value: Any) -> Any:
    """JSON-able and stable across processes: sets sorted, other objects by their repr's digest."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(str(_plain(v)) for v in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
