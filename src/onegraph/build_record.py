"""A build as data: what the index keeps of it, so that another process makes the same without tracing or compiling.

There is no graph in it. It names the artifacts of the pieces, has the text of those that run op by op, and the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.export import Dim

from onegraph.capture.portable import NotPortableError
from onegraph.capture.trace_record import TraceRecord
from onegraph.compilers.eager import EagerCode
from onegraph.compilers.own_ops import OwnOps
from onegraph.config.compilation import CompilationConfig
from onegraph.explanation import Explanation
from onegraph.ir.artifact import CompiledPiece
from onegraph.ir.linear import LinearShape
from onegraph.ir.plan import ExecutionPlan
from onegraph.ir.region import Region
from onegraph.ir.weights import MergedWeight


@dataclass(frozen=True)
class PieceRecord:
    """A piece: `key` is that of its artifact; else `ops` or `code` run it. `facts` are the record of its compile."""

    facts: CompiledPiece
    key: str | None = None
    ops: OwnOps | None = None
    code: EagerCode | None = None


@dataclass(frozen=True)
class RegionRecord:
    """What was made for one region; `pieces` are those of each part, `groups` the indices of weights to merge.

    `texts` are the graphs as text, packed, for traces (TORCH_TRACE). `lines` has the user's lines of each piece's ops,
    by name; `origins` what `capture.origins` makes of the pieces after the passes.
    """

    trace: TraceRecord
    region: Region
    parts: tuple[Region, ...]
    plan: ExecutionPlan
    merged: tuple[MergedWeight, ...]
    groups: tuple[tuple[int, ...], ...]
    pieces: tuple[tuple[PieceRecord, ...], ...]
    texts: bytes
    lines: tuple[Mapping[str, str], ...]
    origins: bytes


@dataclass(frozen=True)
class Asked:
    """What the user gave to `onegraph.compile`, as data: `dynamic_shapes` is that of `portable_shapes`."""

    dynamic_shapes: Any
    config: CompilationConfig
    own_module: bool
    own_weights: bool


@dataclass(frozen=True)
class _Dim:
    name: str
    min: int | None
    max: int | None


@dataclass(frozen=True)
class _DimHint:
    name: str


def portable_shapes(spec: Any) -> Any:
    """`dynamic_shapes` as plain data. Raises NotPortableError for what isn't made of containers and Dims."""
    if isinstance(spec, Mapping):
        return {key: portable_shapes(one) for key, one in spec.items()}
    if isinstance(spec, list | tuple):
        return [portable_shapes(one) for one in spec]
    if spec is None or isinstance(spec, int | str):
        return spec
    for name in ("AUTO", "DYNAMIC", "STATIC"):
        if spec is getattr(Dim, name):
            return _DimHint(name)
    if isinstance(spec, Dim):
        least, most = (value if isinstance(value, int) else None for value in (spec.min, spec.max))
        return _Dim(spec.__name__, least, most)
    raise NotPortableError(f"dynamic_shapes has {spec!r}")


def shapes_of(spec: Any) -> Any:
    """What `portable_shapes` was given."""
    if isinstance(spec, dict):
        return {key: shapes_of(one) for key, one in spec.items()}
    if isinstance(spec, list):
        return [shapes_of(one) for one in spec]
    if isinstance(spec, _DimHint):
        return getattr(Dim, spec.name)
    return Dim(spec.name, min=spec.min, max=spec.max) if isinstance(spec, _Dim) else spec


@dataclass(frozen=True)
class BuildRecord:
    """A whole build. `factors` are those of its place in the index, `linears` the shapes to choose kernels for."""

    asked: Asked
    factors: dict[str, Any]
    regions: tuple[RegionRecord, ...]
    explanation: Explanation
    uses_own_ops: bool
    linears: tuple[LinearShape, ...]


def not_loaded(inputs: list[Any]) -> Any:
    """Stands for a piece's callable in its record."""
    raise AssertionError("a recorded piece was called")
