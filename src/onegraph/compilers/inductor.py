"""The Inductor compiler: from a piece to an artifact's files, and from files to a callable.

A fresh compile and a warm load end in the same code, so they run the same thing. What can't be put into files
(an input whose strides change in place, say) runs as Inductor's own callable, in this process only.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from onegraph.compilers.autotuning import Autotuning
from onegraph.compilers.prepared import Prepared, prepare
from onegraph.compilers.wrapper import execute, put_together, take_apart
from onegraph.counters import counters
from onegraph.errors import CompileError, OnegraphError
from onegraph.ir.artifact import Artifact, OutputAlias, OutputLayout, PieceCallable, PieceCode, PreparedPiece
from onegraph.ir.key import Key
from onegraph.ir.piece import Piece
from onegraph.ir.target import Target
from onegraph.torch_compat import inductor
from onegraph.torch_compat.autotune import choosing

WRAPPER, CONSTANTS = "wrapper.py", "constants.pt"
AUTOTUNED = "autotuned"
"""Among an artifact's facts, its choices."""


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


@dataclass(frozen=True)
class InProcess:
    """A compiled piece that can't be stored, and why."""

    call: PieceCallable
    reason: str
    mutates_inputs: bool


class Compilation:
    """A lowered piece, whose kernels are to be built.

    `conditions` are those on sizes that Inductor relies on beside those of the shape environment.
    """

    def __init__(self, piece: Piece, target: Target, options: dict[str, Any], tuning: Autotuning | None = None) -> None:
        """Must run inside `torch_compat.dynamo.compile_scope`.

        Raises CompileError, which names the piece and says what torch or the toolchain said.
        """
        target.check_toolchain()  # Inductor asks the C++ compiler too, and fails in its own words
        self._started = time.perf_counter()
        self._target, self._num_ops = target, len(piece.graph_module.graph.nodes)
        counters.add("inductor_compiles")
        self._output = _generated(piece, target, options, tuning)
        self.autotuned = () if tuning is None else tuning.made
        self.conditions = self._output.conditions
        self.kernels = self._output.kernels
        self._source = ""
        if self._output.not_portable is None:
            self._source = take_apart(self._output.source, self.kernels)

    def finish(self, key: Key | None, built: Mapping[str, bytes]) -> Artifact | InProcess:
        """What is made with the files of a library that has the kernels. Raises CompileError."""
        output = self._output
        if output.not_portable is not None:
            assert output.callable is not None and output.link is not None
            with _in_files(built) as paths:
                output.link(self._target.load_kernels(paths))
            function = output.callable
            call = _with_layouts(lambda inputs: function(*inputs), output.layouts)
            return InProcess(call, output.not_portable, output.mutates_inputs)
        files = {WRAPPER: self._source.encode(), **built}
        if output.constants:
            buffer = io.BytesIO()
            torch.save(output.constants, buffer)
            files[CONSTANTS] = buffer.getvalue()
        return Artifact(
            key=key or Key("", {}),
            files=files,
            aliases=output.aliases,
            layouts=output.layouts,
            aligned_inputs=output.aligned_inputs,
            mutates_inputs=output.mutates_inputs,
            seconds=time.perf_counter() - self._started,
            facts={
                "num_kernels": len(self.kernels),
                "num_ops": self._num_ops,
                AUTOTUNED: [one.to_dict() for one in self.autotuned],
            },
        )


def _generated(
    piece: Piece, target: Target, options: dict[str, Any], tuning: Autotuning | None
) -> inductor.InductorOutput:
    graph_module, inputs = copy.deepcopy(piece.graph_module), list(piece.fake_inputs)
    try:
        with contextlib.nullcontext() if tuning is None else choosing(tuning.choose):
            return inductor.compile_graph(graph_module, inputs, piece.fake_mode, options, target.device_types)
    except OnegraphError:
        raise
    except Exception as error:
        own = next((one for one in _causes(error) if isinstance(one, OnegraphError)), None)
        if own is not None:  # of a choice of a kernel; torch wraps what a lowering raises
            raise own from None
        raise CompileError(
            f"Inductor failed on piece {piece.index}: {type(error).__name__}: {_first_lines(error)}",
            where=f"piece {piece.index}, {len(piece.graph_module.graph.nodes)} nodes",
            hint="-O.backend=aot_eager or --enforce-eager runs without Inductor; --verbose shows torch's traceback",
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


@contextlib.contextmanager
def _in_files(contents: Mapping[str, bytes]) -> Iterator[dict[str, Path]]:
    with tempfile.TemporaryDirectory(prefix="onegraph-kernels-") as folder:
        paths = {name: Path(folder) / name for name in contents}
        for name, path in paths.items():
            path.write_bytes(contents[name])
        yield paths


def load_artifact(files: Mapping[str, Path], facts: LoadingFacts, target: Target) -> PieceCallable:
    """A callable made of an artifact's files and facts alone. Runs no compiler. The files may go away afterwards."""
    constants: dict[str, Any] = {}
    if CONSTANTS in files:
        constants = torch.load(files[CONSTANTS], weights_only=True)
    path = files[WRAPPER]
    source = path.read_text()
    namespace = put_together(path, source, target.load_kernels(files), constants)

    def finished(call: PieceCallable, layouts: tuple[OutputLayout, ...]) -> PieceCallable:
        call = _with_aligned_inputs(call, facts.aligned_inputs, facts.mutates_inputs)
        call = _with_layouts(call, layouts)
        return _with_aliases(call, facts.aliases) if facts.aliases else call

    call = finished(namespace["call"], facts.layouts)
    prepared = prepare(source) if target.plans_memory else None
    if prepared is None:
        return call
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
                None if shown is None or index in aliased else shown[0] for index, shown in enumerate(prepared.outputs)
            ),
            scratch_layouts=namespace["scratch_layouts"],
            results_layouts=namespace["results_layouts"],
            scratch_views=namespace["scratch"],
            bind=bind,
        ),
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
            if tensor.data_ptr() % inductor.ALIGNMENT:
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


def _with_layouts(call: PieceCallable, layouts: tuple[OutputLayout, ...]) -> PieceCallable:
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


def _first_lines(error: BaseException) -> str:
    return "\n".join(str(error).strip().splitlines()[:8])
