"""From an artifact's files to a callable. A fresh compile and a warm load end here, so they run the same thing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from onegraph.compilers.prepared import Prepared, prepare
from onegraph.compilers.wrapper import execute, execute_as, put_together
from onegraph.ir.artifact import (
    LoadedPiece,
    OutputAlias,
    OutputLayout,
    PieceCallable,
    PieceCode,
    PieceSource,
    PreparedPiece,
)
from onegraph.ir.target import Target
from onegraph.ops.library import OutFunctions

WRAPPER, CONSTANTS, GRAPH = "wrapper.py", "constants.pt", "graph.py"
AUTOTUNED, NODES = "autotuned", "nodes"
"""Among an artifact's facts, its choices, and the names of the graph's nodes."""


ALIGNMENT = 16
"""Bytes: what kernels for GPUs take for granted of inputs' addresses, where the traced inputs had it. It is that of
`torch._inductor.utils`, which takes seconds to import; a test compares the two."""


class LoadingFacts(Protocol):
    """What is kept beside an artifact's files: an Artifact or its manifest. See `ir.artifact` for the fields."""

    @property
    def aliases(self) -> tuple[OutputAlias, ...]: ...
    @property
    def layouts(self) -> tuple[OutputLayout, ...]: ...
    @property
    def aligned_inputs(self) -> tuple[int, ...]: ...
    @property
    def mutates_inputs(self) -> bool: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...


def load_artifact(
    files: Mapping[str, Path],
    facts: LoadingFacts,
    target: Target,
    *,
    shows_file: bool = False,
    as_written: bool = False,
) -> PieceCallable:
    """A callable made of an artifact's files and facts alone. Runs no compiler. The files may go away afterwards.

    With `shows_file` tracebacks and debuggers show lines of the wrapper's file for what was prepared of it, too. With
    `as_written` nothing is prepared once for a size: an edited wrapper runs line by line, and its intermediate values
    have memory of their own in each call.
    """
    constants: dict[str, Any] = {}
    if CONSTANTS in files:
        constants = torch.load(files[CONSTANTS], weights_only=True)
    path = files[WRAPPER]
    source = path.read_text()
    namespace = put_together(path, source, target.load_kernels(files), OutFunctions(target.dispatch_key), constants)
    nodes = facts.facts.get(NODES)
    shown = PieceSource(source, namespace, None if nodes is None else tuple(nodes))

    def finished(call: PieceCallable, layouts: tuple[OutputLayout, ...]) -> PieceCallable:
        call = _with_aligned_inputs(call, facts.aligned_inputs, facts.mutates_inputs)
        call = with_layouts(call, layouts)
        return _with_aliases(call, facts.aliases) if facts.aliases else call

    call = finished(namespace["call"], facts.layouts)
    prepared = prepare(source) if target.plans_memory and not as_written else None
    if prepared is None:
        return LoadedPiece(call, shown)
    if shows_file:
        execute_as(path, prepared.source, prepared.lines, namespace)
    else:
        execute(f"{path} prepared", prepared.source, namespace)
    aliased = {alias.output for alias in facts.aliases}
    bind = functools.partial(_bound, prepared, namespace, facts.layouts, finished)
    return PieceCode(
        call,
        prepared.kept_inputs | {alias.input for alias in facts.aliases},
        PreparedPiece(
            sizes=prepared.sizes,
            size_names=prepared.size_names,
            scratch=prepared.scratch,
            results=prepared.results,
            outputs=tuple(
                None if place is None or index in aliased else place[0] for index, place in enumerate(prepared.outputs)
            ),
            scratch_layouts=namespace["scratch_layouts"],
            results_layouts=namespace["results_layouts"],
            scratch_views=namespace["scratch"],
            bind=bind,
        ),
        shown,
    )


def _bound(
    prepared: Prepared,
    functions: Mapping[str, Any],
    layouts: tuple[OutputLayout, ...],
    finished: Callable[[PieceCallable, tuple[OutputLayout, ...]], PieceCallable],
    scratch: tuple[torch.Tensor, ...],
    buffers: Sequence[torch.Tensor | None],
    sizes: tuple[int, ...],
    checks: bool,
) -> PieceCallable:
    """As PreparedPiece.bind."""
    run, results = functions["run"], functions["results"]
    call: PieceCallable
    if any(buffer is None for buffer in buffers):
        allocate, given = functions["empty_strided_cpu"], functions["results_layouts"](*sizes)
        pairs = list(zip(buffers, given, strict=True))

        def call(inputs: list[Any]) -> Any:
            made = [allocate(*layout) if buffer is None else buffer for buffer, layout in pairs]
            return run(scratch, results(made, *sizes), inputs)

    else:
        views = results(buffers, *sizes)
        call = functools.partial(run, scratch, views)
        shown = {i: views[place[1]] for i, place in enumerate(prepared.outputs) if place is not None}
        layouts = tuple(one for one in layouts if one.output not in shown or not _is_laid_out(shown[one.output], one))
    call = finished(call, layouts)
    if not checks:
        return call
    check = functions["check"]

    def checked(inputs: list[Any]) -> Any:
        check(inputs, *sizes)
        return call(inputs)

    return checked


def _is_laid_out(tensor: torch.Tensor, layout: OutputLayout) -> bool:
    return bool(tensor.permute(layout.order).is_contiguous())


def _with_aligned_inputs(call: PieceCallable, indices: tuple[int, ...], mutates_inputs: bool) -> PieceCallable:
    """Copies inputs that don't lie where the kernels take them to lie, and writes back what was changed in a copy."""
    if not indices:
        return call

    def run(inputs: list[Any]) -> Any:
        copied = []
        for index in indices:
            tensor = inputs[index]
            if tensor.data_ptr() % ALIGNMENT:
                inputs[index] = _copy(tensor)
                copied.append((tensor, inputs[index]))
        outputs = call(inputs)
        if mutates_inputs:
            for tensor, copy_of_it in copied:
                tensor.copy_(copy_of_it)
        return outputs

    return run


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same sizes and strides, whatever these are."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    whole = tensor.as_strided((max(length, 0) if tensor.numel() else 0,), (1,)).clone()
    return whole.as_strided(tensor.size(), tensor.stride())


def with_layouts(call: PieceCallable, layouts: tuple[OutputLayout, ...]) -> PieceCallable:
    """Copies outputs that aren't laid out as the graph says, which its users rely on."""
    contiguous = [one.output for one in layouts if list(one.order) == sorted(one.order)]
    permuted = [
        (one.output, one.order, [one.order.index(dim) for dim in range(len(one.order))])
        for one in layouts
        if one.output not in contiguous
    ]
    if not layouts:
        return call

    def run(inputs: list[Any]) -> Any:
        outputs = call(inputs)
        for index in contiguous:
            if not outputs[index].is_contiguous():
                outputs = list(outputs)
                outputs[index] = outputs[index].contiguous()
        for index, order, inverse in permuted:
            dense = outputs[index].permute(order)
            if not dense.is_contiguous():
                outputs = list(outputs)
                outputs[index] = dense.contiguous().permute(inverse)
        return outputs

    return run


def _with_aliases(call: PieceCallable, aliases: tuple[OutputAlias, ...]) -> PieceCallable:
    """Gives inputs, and views of them, for outputs that share their memory."""
    texts = [alias.place or "None" for alias in aliases]
    places = eval(f"lambda args: ({', '.join(texts)},)")  # noqa: S307 - made of an artifact's own facts

    def run(inputs: list[Any]) -> Any:
        tensors, found = [inputs[alias.input] for alias in aliases], places(inputs)
        outputs = list(call(inputs))
        for alias, base, place in zip(aliases, tensors, found, strict=True):
            out = outputs[alias.output]
            if not alias.is_view:
                outputs[alias.output] = base
            elif place is not None:
                outputs[alias.output] = _laid_over(base, out, *place)
            elif out.dtype == base.dtype:  # else compiled code made it over the same memory
                outputs[alias.output] = base.as_strided(out.size(), out.stride(), out.storage_offset())
        return outputs

    return run


def _laid_over(base: torch.Tensor, out: torch.Tensor, *place: int) -> torch.Tensor:
    """A tensor of the size and dtype of `out` in the memory of `base`; `place` is as for OutputAlias."""
    *stride, num_bytes = place
    offset = (base.storage_offset() * base.itemsize + num_bytes) // out.itemsize
    if out.dtype == base.dtype:
        return base.as_strided(out.size(), stride, offset)
    return torch.empty(0, dtype=out.dtype, device=base.device).set_(base.untyped_storage(), offset, out.size(), stride)
