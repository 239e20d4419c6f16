"""The warm start: the build that an earlier process recorded, checked and bound to this process's module.

It makes the checks of the trace anew, loads the artifacts, and binds the module's weights: it runs neither Dynamo nor a
compiler, and imports none of them.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import onegraph.version
from onegraph.binding import BoundWeights, bind_groups, bind_weights
from onegraph.build_call import BuildCall
from onegraph.build_record import BuildRecord, PieceRecord, RegionRecord
from onegraph.build_trace import (
    GraphTexts,
    log_dims,
    trace_build,
    trace_evaluation,
    trace_links,
    trace_process,
)
from onegraph.built import Built
from onegraph.capture.origins import origins_from_bytes
from onegraph.capture.portable import loaded
from onegraph.capture.signatures import traced_function
from onegraph.capture.trace_record import RevivedTrace, TraceDiffersError, revive_trace
from onegraph.compilers import eager, own_ops
from onegraph.compilers.loading import WRAPPER, load_artifact
from onegraph.compilers.machine import machine_factors
from onegraph.config.resolve import ResolvedConfig
from onegraph.counters import counters
from onegraph.cudagraph.graph import recorded_graph
from onegraph.cudagraph.lint import calling_line
from onegraph.cudagraph.recordings import Recordings
from onegraph.explanation import Explanation, IndexExplanation
from onegraph.ir.artifact import PieceCallable
from onegraph.ir.key import Key, Unkeyable
from onegraph.ir.ledger import LedgerCheck
from onegraph.ir.recording import Recorder
from onegraph.ir.region import Region
from onegraph.ir.source_text import code_digest
from onegraph.ir.target import Target
from onegraph.kept_artifacts import load_kept
from onegraph.linear_kernels import choose_kernels_for
from onegraph.op_kernels import install_op_kernels
from onegraph.pending import pending
from onegraph.plan.function import failed_piece, plan_function, region_finder
from onegraph.plan.memory import size_names
from onegraph.plan.slots import allocate_slots
from onegraph.saving import saving
from onegraph.step_timing import CompiledGraph
from onegraph.store.index import Index, Miss, TraceRefusedError
from onegraph.store.store import Store
from onegraph.store.unpacked import tell_edits
from onegraph.timeline import timeline
from onegraph.torch_compat.changed_config import changed_config
from onegraph.torch_compat.custom_hooks import hook_identities
from onegraph.torch_compat.pytree import tree_flatten, tree_unflatten
from onegraph.torch_compat.structured_trace import trace_is_written, traced_without_dynamo
from onegraph.torch_compat.torch_logs import a_log_is_read

_OF_NO_EFFECT = frozenset(
    {
        *("compile_cache_save_format", "on_state_change", "on_memory_change", "cudagraph_mode"),
        *("cudagraph_capture_sizes", "cudagraph_check", "cudagraph_lazy", "cudagraph_debug"),
        *("cudagraph_traffic", "cudagraph_memory_mib", "cudagraph_padding"),
    }
)
"""Fields that change nothing of what is built."""
_ASKED_MATTERS = ("passes", "splitting_ops", "autotune")
"""Fields whose value is refused where it can't be honoured, if it was asked for."""


@dataclass(frozen=True)
class RevivedRegion:
    """A region that can run: `call` takes the module's arguments, whose sizes `region` must have.

    `wrappers` are the files of the code of each artifact, by its key.
    """

    trace: RevivedTrace
    record: RegionRecord
    weights: BoundWeights
    call: Callable[..., Any]
    run: Callable[..., Any]
    """The plan's function."""
    recordings: Recordings | None
    wrappers: Mapping[str, Path]

    def code(self) -> Iterator[tuple[int, Region, Path]]:
        """Each piece's code, once for an artifact: its number, the sizes that it is for, and the file."""
        for index, parts in enumerate(zip(*self.record.pieces, strict=True)):
            keys = [piece.key for piece in parts]
            regions = self.record.parts if len(set(keys)) > 1 else (self.record.region,)
            for key, region in zip(keys, regions, strict=False):
                if key is not None:
                    yield index, region, self.wrappers[key]


def index_key(call: BuildCall) -> Key | Unkeyable:
    """The key of all that is known of a build before it is traced, but for the call; or why it has none."""
    config = call.config
    if call.store is None:
        return Unkeyable("the compile cache is off")
    if call.fuel is not None or call.pass_observer is not None:
        return Unkeyable("the passes are watched")
    if call.made_observer is not None:
        return Unkeyable("the pieces' graphs are asked for, which only tracing gives")
    if config.extra_passes:
        return Unkeyable("extra_passes may read anything")
    if config.check_passes:
        return Unkeyable("check_passes compares graphs, which only tracing gives")
    if config.compile_cache_save_format != "binary":
        return Unkeyable("unpacked artifacts may have been edited")
    hooks = hook_identities()
    if isinstance(hooks, str):
        return Unkeyable(hooks)
    module = call.module
    function, owner = traced_function(module)
    try:
        tensors = _tensors_of(owner)
    except Exception as error:  # noqa: BLE001 - a tensor that isn't there yet, or a subclass that doesn't say
        return Unkeyable(f"the module's tensors can't be told: {type(error).__name__}: {str(error)[:80]}")
    fields = {name: one["value"] for name, one in config.to_dict().items() if name not in _OF_NO_EFFECT}
    try:
        return Key.of(
            {
                "onegraph": [onegraph.version.__version__, whole_code_digest()],
                "python": f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor}",
                "function": [function.__module__, function.__qualname__, code_digest(function.__code__)],
                "called": f"{type(module).__module__}.{type(module).__qualname__}",
                "config": fields,
                "asked": [name for name in _ASKED_MATTERS if config.asked(name)],
                "state": [call.state_checked, call.owned is not None, torch.is_grad_enabled()],
                "tensors": tensors,
                "torch_config": changed_config(),
                "hooks": hooks,
                "machine": machine_factors(call.target),
            }
        )
    except TypeError as error:
        return Unkeyable(f"its configuration isn't plain data: {error}")


def _tensors_of(owner: Any) -> str:
    """The digest of the kinds of a module's tensors, and of which are the same."""
    if not isinstance(owner, torch.nn.Module):
        return ""
    digest, first = hashlib.sha256(), dict[int, str]()
    for kind in (owner.named_parameters, owner.named_buffers):
        for name, value in kind(remove_duplicate=False):
            same = first.setdefault(id(value), name)
            strides = value.stride() if value.layout == torch.strided and not value.is_nested else value.layout
            shape = () if value.is_nested else tuple(value.shape)
            facts = (name, same, type(value).__qualname__, value.dtype, value.device, shape, strides)
            digest.update(repr(facts).encode())
    return digest.hexdigest()


@cache
def whole_code_digest() -> str:
    """The digest of our own code: an edit of it never meets what it has made of models before."""
    root = Path(onegraph.version.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h") and path.is_file():
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def from_index(call: BuildCall, digest: str, without_index: Callable[[BuildCall], Built]) -> Built | Miss:
    """The build of a recorded trace that is right for this module and call.

    `without_index(call)` traces a call anew: a piece that shall fall back to eager needs its graph.
    """
    assert call.store is not None

    def load(contents: bytes, key: str) -> tuple[Built, list[RevivedRegion]]:
        try:
            record: BuildRecord = loaded(contents)
        except (ImportError, AttributeError) as error:  # what the trace names isn't in this process
            raise TraceRefusedError(f"{type(error).__name__}: {error}") from error
        regions, notes = _revived_regions(record, call)
        built = _built(record, regions, notes, call, without_index)
        return replace(built, save=saving(call, key, built.explanation, record.uses_own_ops)), regions

    with call.stages.stage("index"):
        found = Index(call.store).lookup(digest, load)
    counters.add("index_misses" if isinstance(found, Miss) else "index_hits")
    if isinstance(found, Miss):
        return found
    built, regions = found
    built = replace(built, explanation=replace(built.explanation, stages=call.stages.totals()))
    timeline.is_ready()
    if trace_is_written() or a_log_is_read():
        _show(built.explanation, regions, call)
    return built


def _show(explanation: Explanation, regions: list[RevivedRegion], call: BuildCall) -> None:
    """Writes into torch's trace and logs what a fresh build writes, from what was kept of it."""
    seconds = sum(seconds for _, seconds in explanation.stages)
    with traced_without_dynamo(call.name, seconds, explanation.num_ops):
        trace_process(call.target, explanation.config)
        for one in regions:
            record = one.record
            texts = GraphTexts.kept(record.texts, record.region)
            texts.split(record.plan, explanation.pieces)
            for index, region, path in one.code():
                texts.code(index, region, path.read_text)
        reads = [read for one in regions for read in one.record.trace.reads]
        checks = [LedgerCheck(what, value, value, True) for what, value, _ in reads]
        why = "" if explanation.index is None else explanation.index.why
        trace_evaluation("taken", why, len(checks), checks)
        log_dims(explanation)
        trace_build(explanation, call.target, call.store)
    trace_links(explanation, call.store)


def _built(
    record: BuildRecord,
    regions: list[RevivedRegion],
    notes: tuple[str, ...],
    call: BuildCall,
    without_index: Callable[[BuildCall], Built],
) -> Built:
    example = Example(call.args, call.kwargs)
    without_call = replace(call, args=(), kwargs={})

    def fall_back(piece: int, why: str, size: int | None) -> Built:
        args, kwargs = example.arguments()
        built = without_index(replace(without_call, args=args, kwargs=kwargs))
        assert built.fallback is not None
        return built.fallback(piece, why, size)

    first, store = regions[0], call.store
    pieces = (one for region in record.regions for part in region.pieces for one in enumerate(part))
    if store is not None:
        tell_edits(store.root, ((index, piece.facts) for index, piece in pieces), are_used=False)
    entry = first.trace.call.contract.bind([(one.record.region.predicate, one.call) for one in regions])
    slots = functools.partial(allocate_slots, first.record.trace.sized, first.record.trace.dims)
    explanation = replace(_explanation(record, call.name, call.config, notes), pending=_pending(record, call.target))
    return without_call.with_checks(
        Built(
            entry,
            explanation,
            fallback=fall_back,
            failed_piece=failed_piece,
            slots=slots,
            recordings=tuple(one.recordings for one in regions if one.recordings is not None),
            graphs=tuple(
                CompiledGraph(one.run, one.recordings, functools.partial(origins_from_bytes, one.record.origins))
                for one in regions
            ),
        ),
        (read for one in regions for read in one.trace.call.state),
        [one.weights for one in regions],
    )


def _revived_regions(record: BuildRecord, call: BuildCall) -> tuple[list[RevivedRegion], tuple[str, ...]]:
    """The regions of a recorded build, bound to the module, and notes. Raises TraceRefusedError."""
    revived = []
    for region in record.regions:
        try:
            trace = revive_trace(
                region.trace,
                call.module,
                call.args,
                call.kwargs,
                dynamic_shapes=call.dynamic_shapes,
                max_size=call.config.max_num_tokens,
                required_alignment=call.target.required_alignment,
            )
        except TraceDiffersError as error:
            raise TraceRefusedError(str(error), error.num_held, error.checks) from error
        revived.append((region, trace))
    notes: tuple[str, ...] = ()
    if record.uses_own_ops:
        notes = install_op_kernels(call.target, call.store).notes
        notes += tuple(map(str, choose_kernels_for(record.linears, call.target, call.store)))
    recorder = call.recorder()
    return [_revived(region, trace, call, recorder) for region, trace in revived], notes


def _revived(record: RegionRecord, trace: RevivedTrace, call: BuildCall, recorder: Recorder | None) -> RevivedRegion:
    owned, target = call.owned, call.target
    assert call.store is not None
    if owned is not None and record.groups and target.runs:
        survey = owned.survey(target.required_alignment)
        for group in record.groups:
            why = survey.why_not([trace.weights[index] for index in group])
            if why is not None:
                raise TraceRefusedError(f"weights were merged, and can't be now: {why}")
    known: dict[str, PieceCallable] = {}
    wrappers: dict[str, Path] = {}
    calls = [[*_pieces(pieces, known, wrappers, target, call.store)] for pieces in record.pieces]
    counters.add("store_hits", len(known))
    finder = region_finder([part.ranges[0][1:] for part in record.parts]) if len(record.parts) > 1 else None
    sizes = size_names(record.plan, calls) if call.config.plan_memory else None
    run = plan_function(record.plan, calls, finder, sizes)
    recordings = None
    if recorder is not None:
        graph = recorded_graph(
            record.plan,
            run,
            weights=(*(weight.name for weight in trace.weights), *(one.name for one in record.merged)),
            input_names=record.trace.input_names,
            is_tensor=record.trace.is_tensor,
            sized=record.trace.sized,
            unrecordable={},
            user_line=lambda piece, op: calling_line(record.lines[piece], op),
        )
        recordings = Recordings.configured(graph, recorder, call.config)
    groups = None
    if owned is not None and target.runs:
        groups = bind_groups(owned, trace.weights, record.groups, target.required_alignment)
    mutates_inputs = any(piece.facts.mutates_inputs for pieces in record.pieces for piece in pieces)
    tensors = [index for index, is_tensor in enumerate(record.trace.is_tensor) if is_tensor and mutates_inputs]
    names, told = record.trace.input_names, call.told_of_weights(recordings)
    weights = bind_weights(recordings or run, trace.weights, names, tensors, groups, told=told)
    return RevivedRegion(trace, record, weights, trace.call.make_callable(weights.run), run, recordings, wrappers)


def _pieces(
    pieces: tuple[PieceRecord, ...],
    known: dict[str, PieceCallable],
    wrappers: dict[str, Path],
    target: Target,
    store: Store,
) -> Iterable[PieceCallable]:
    made: list[PieceCallable] = []
    for index, piece in enumerate(pieces):
        if piece.facts.same_as is not None:
            call = made[piece.facts.same_as]
        elif piece.key is not None:
            if piece.key not in known:
                with timeline.stage(f"piece {index}", "loading"):
                    found = load_kept(store, piece.key, lambda kept: load_artifact(kept.files, kept.manifest, target))
                if found is None:
                    raise TraceRefusedError(f"the artifact of piece {index} is gone")
                known[piece.key] = found[0]
                wrappers[piece.key] = found[1].files[WRAPPER]
            call = known[piece.key]
        else:
            assert piece.code is not None
            call = eager.load_piece(piece.code, index)
            if piece.ops is not None:
                call = own_ops.load_piece(piece.ops, call, target, index)
        made.append(call)
        yield call


def _explanation(record: BuildRecord, name: str, config: ResolvedConfig, notes: tuple[str, ...]) -> Explanation:
    """How the build came about now: as it was told when it was recorded, with artifacts that the store has."""
    kept = "the trace holds, and its artifact is kept"
    pieces = tuple(
        replace(
            piece,
            ranges=tuple(
                one if one.key is None else replace(one, store="hit", why=kept, seconds=0.0) for one in piece.ranges
            ),
        )
        for piece in record.explanation.pieces
    )
    held = IndexExplanation(
        "hit", f"all {len(record.explanation.ledger.state)} values that the trace read are the same"
    )
    return replace(
        record.explanation, model=name, config=config.to_dict(), pieces=pieces, notes=notes, index=held, checks=()
    )


def _pending(record: BuildRecord, target: Target) -> tuple[str, ...]:
    """As `pending`, of a recorded build."""
    if target.runs:
        return ()
    merged = (one for region in record.regions for one in region.merged)
    return pending(target, merged, record.linears, uses_own_ops=record.uses_own_ops)


class Example:
    """A call's arguments without their memory, to trace once more: tensors are remembered by their kinds."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leaves, self._tree = tree_flatten((args, kwargs))
        self._leaves = [_Kind.of(leaf) if type(leaf) is torch.Tensor else leaf for leaf in self._leaves]

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the same kinds."""
        made: dict[int, torch.Tensor] = {}
        leaves = [leaf.tensor(made) if isinstance(leaf, _Kind) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._tree)
        return args, kwargs


@dataclass(frozen=True)
class _Kind:
    identity: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Any:
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_conj() or tensor.is_neg():
            return tensor
        return cls(id(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def tensor(self, made: dict[int, torch.Tensor]) -> torch.Tensor:
        if self.identity not in made:
            made[self.identity] = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        return made[self.identity]
