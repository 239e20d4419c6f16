"""The Inductor compiler: from a piece to an artifact's files.

They are loaded by `loading`, in a fresh compile too. What can't be put into files
(an input whose strides change in place, say) runs as Inductor's own callable, in this process only.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onegraph.compilers.autotuning import Autotuning
from onegraph.compilers.loading import AUTOTUNED, CONSTANTS, GRAPH, NODES, WRAPPER, with_layouts
from onegraph.compilers.wrapper import take_apart
from onegraph.counters import counters
from onegraph.errors import CompileError, OnegraphError
from onegraph.ir.artifact import Artifact, PieceCallable
from onegraph.ir.fx_nodes import computed_nodes
from onegraph.ir.key import Key
from onegraph.ir.piece import Piece
from onegraph.ir.target import Target
from onegraph.ops.library import ops_with_out
from onegraph.timeline import timeline
from onegraph.torch_compat import inductor
from onegraph.torch_compat.autotune import choosing
from onegraph.torch_compat.out_lowering import lower_to_out


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
        self._graph = piece.graph_module.print_readable(print_output=False)
        self._nodes = [node.name for node in computed_nodes(piece.graph_module.graph)]
        counters.add("inductor_compiles")
        with timeline.stage(f"piece {piece.index}", "Inductor"):
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
            call = with_layouts(lambda inputs: function(*inputs), output.layouts)
            return InProcess(call, output.not_portable, output.mutates_inputs)
        files = {WRAPPER: self._source.encode(), GRAPH: self._graph.encode(), **built}
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
                NODES: self._nodes,
                AUTOTUNED: [one.to_dict() for one in self.autotuned],
            },
        )


def _generated(
    piece: Piece, target: Target, options: dict[str, Any], tuning: Autotuning | None
) -> inductor.InductorOutput:
    graph_module, inputs = copy.deepcopy(piece.graph_module), list(piece.fake_inputs)
    for op in ops_with_out():
        lower_to_out(op)
    try:
        with contextlib.nullcontext() if tuning is None else choosing(tuning.choose), target.compiling():
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


def _first_lines(error: BaseException) -> str:
    return "\n".join(str(error).strip().splitlines()[:8])
