"""The pass runner: rewrites the pieces of a split graph, one pass after the other, and records what each did.

Takes a SplitGraph and the passes that were chosen. Gives new pieces, the merged weights that they take as further
inputs, and the records. The pieces that it was given stay as they are: they are what a piece falls back to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from onegraph.config.resolve import ResolvedConfig
from onegraph.errors import CompileError, OnegraphError
from onegraph.ir.fx_nodes import called, changed_arguments, storage_of, storage_of_value, value_of
from onegraph.ir.graph import WeightInput
from onegraph.ir.key import Unkeyable
from onegraph.ir.passes import (
    Border,
    BorderPass,
    Fuel,
    NearMiss,
    Pass,
    PassContext,
    PassRun,
    graph_copy,
    layout_of,
    update_values,
)
from onegraph.ir.piece import Piece, SplitGraph
from onegraph.ir.region import Region
from onegraph.ir.target import Target
from onegraph.ir.weights import MergedWeight
from onegraph.passes.check import check_rewrite
from onegraph.torch_compat import fake_runs, shapes
from onegraph.torch_compat.graph_text import graph_text
from onegraph.torch_compat.op_modes import enters_autocast, is_transformed

WhyNot = Callable[[Sequence[WeightInput]], str | None]
"""Why weights can't be merged; None where they can."""

PassObserver = Callable[[int, str, torch.fx.GraphModule], None]
"""Called with the piece's index, the pass's name (`""` before the first) and the graph after it."""


@dataclass(frozen=True)
class PassSettings:
    """What the passes may know and do beside the graphs.

    `weights` are the module's tensors by the names of the graph's inputs; `why_not` judges whether some can be merged.
    `left_alone` are pieces that run as they were captured. `check` compares each pass's piece before and after.
    """

    passes: tuple[Pass | BorderPass, ...]
    region: Region | None
    target_facts: frozenset[str]
    weights: Mapping[str, WeightInput] = field(default_factory=dict)
    why_not: WhyNot = lambda sources: "nobody owns the weights"
    left_alone: frozenset[int] = frozenset()
    check: bool = False
    fuel: Fuel = field(default_factory=Fuel)
    observer: PassObserver = lambda piece, name, graph_module: None


def pass_settings(
    passes: tuple[Pass | BorderPass, ...],
    config: ResolvedConfig,
    target: Target,
    fuel: Fuel | None = None,
    observer: PassObserver = lambda piece, name, graph_module: None,
) -> PassSettings:
    """As the configuration has them, without weights and region."""
    return PassSettings(
        passes=passes,
        region=None,
        target_facts=target.facts,
        left_alone=frozenset(config.eager_pieces),
        check=config.check_passes,
        fuel=fuel or Fuel(),
        observer=observer,
    )


@dataclass(frozen=True)
class Passed:
    """The pieces after the passes, in order, with the merged weights that they take, and each piece's records."""

    pieces: tuple[Piece, ...]
    merged: tuple[MergedWeight, ...]
    runs: tuple[tuple[PassRun, ...], ...]


def run_passes(split: SplitGraph, settings: PassSettings) -> Passed:
    """Raises CompileError, which names the pass and the piece, for a pass that fails or, checked, changes results.

    Equal pieces are rewritten once, and share their new graph, as long as fuel needn't be counted.
    """
    if why_not := _why_none(split):
        skipped = tuple(PassRun(one.name, skipped=why_not) for one in settings.passes)
        return Passed(split.pieces, (), tuple(skipped if one.kind == "compiled" else () for one in split.pieces))
    whole = _Whole(split, settings)
    pieces: list[Piece] = []
    runs: list[tuple[PassRun, ...]] = []
    known: dict[Any, _Rewriting] = {}
    for piece in split.pieces:
        if piece.kind != "compiled" or piece.eager_why or piece.index in settings.left_alone:
            pieces.append(piece)
            runs.append(())
            continue
        identity = whole.identity(piece) if settings.fuel.left is None else None
        done = known.get(identity) if identity is not None else None
        passed = None if done is None else done.for_twin(piece)
        if done is None or passed is None:
            done = known[identity] = _Rewriting(piece, whole)
            pieces.append(done.passed)
            runs.append(tuple(done.runs))
        else:
            pieces.append(passed)
            runs.append(tuple(replace(run, seconds=0.0) for run in done.runs))
    for one in settings.passes:
        if isinstance(one, BorderPass):
            _rewrite_borders(one, split, pieces, runs, settings)
    used = {name for piece in pieces for name in piece.inputs}
    merged = (one for name, one in whole.merged.items() if name in used)
    return Passed(tuple(pieces), tuple(merged), tuple(runs))


def _why_none(split: SplitGraph) -> str | None:
    """Why no pass may run: modes under which a call isn't what it is where fake values are made anew."""
    nodes = [node for piece in split.pieces for node in piece.graph_module.graph.nodes]
    values = [value for node in nodes if isinstance(value := value_of(node), torch.Tensor)]
    devices = filter(torch.amp.is_autocast_available, {value.device.type for value in values})
    if any(map(torch.is_autocast_enabled, devices)) or any(map(enters_autocast, nodes)):
        return "autocast chooses the dtypes of calls"
    return "the graph has transforms of torch.func" if any(map(is_transformed, values)) else None


class _Whole:
    """What the pieces of a graph have in common: the settings, the weights merged so far, who reads what."""

    def __init__(self, split: SplitGraph, settings: PassSettings) -> None:
        self.settings = settings
        self.merged: dict[str, MergedWeight] = {}
        self.strided = _read_by_own_ops_alone(split)
        nodes = (node for piece in split.pieces for node in piece.graph_module.graph.nodes)
        self._changed = {storage_of(one) for node in nodes for one in changed_arguments(node)}

    def identity(self, piece: Piece) -> Any:
        """Equal for pieces that passes rewrite alike, but for what `merge` says; None where that can't be told."""
        shape_env = _mode_of(piece).shape_env
        text = graph_text(piece.graph_module, shape_env)
        if isinstance(text, Unkeyable):
            return None
        weights = tuple(name in self.settings.weights for name in piece.inputs)
        strided = tuple(name in self.strided for name in piece.outputs)
        symbols = tuple(
            dict.fromkeys(name for value in piece.fake_inputs for name in sorted(shapes.symbols_of([value], shape_env)))
        )
        return text, weights, strided, symbols

    def merge(self, names: Sequence[str], storages: Sequence[int | None]) -> MergedWeight | str:
        """A merged weight of these inputs of the graph, or why there can't be one."""
        sources = []
        for name, storage in zip(names, storages, strict=True):
            if name not in self.settings.weights:
                return f"{name} is no weight of the module"
            if storage in self._changed:
                return f"{self.settings.weights[name].name} is changed in place"
            sources.append(self.settings.weights[name])
        why_not = self.settings.why_not(sources)
        if why_not is not None:
            return why_not
        one = MergedWeight("merged_" + "_".join(name.removeprefix("weight_") for name in names), tuple(names))
        for other in self.merged.values():
            if other != one and not set(other.sources).isdisjoint(names):
                return (
                    f"{sources[0].name} and those to merge it with are merged already, in another order or with others"
                )
        self.merged[one.name] = one
        return one


class _Rewriting:
    """One piece on its way through the passes; `passed` is what comes out."""

    def __init__(self, piece: Piece, whole: _Whole) -> None:
        self.piece, self.whole, self.settings = piece, whole, whole.settings
        self.graph_module = graph_copy(piece.graph_module)
        self.graph = self.graph_module.graph
        for node in self.graph.nodes:
            if value_of(node) is None:
                node.meta["example_value"] = None  # was there without a value, so it isn't run to get one
        placeholders = self.graph.find_nodes(op="placeholder")
        self.names: dict[Node, str] = dict(zip(placeholders, piece.inputs, strict=True))
        weights = self.settings.weights
        self.weights = {node: weights[name].name for node, name in self.names.items() if name in weights}
        self.outputs = [value_of(node) if isinstance(node, Node) else None for node in _outputs(self.graph)]
        self.added: dict[Node, MergedWeight] = {}
        self.fake_mode = _mode_of(piece)
        self.runs: list[PassRun] = []
        self._asked: list[tuple[tuple[int, ...], bool]] = []
        """What was asked to be merged, as the piece's inputs, and whether it was."""
        self.settings.observer(piece.index, "", self.graph_module)
        for one in self.settings.passes:
            if not isinstance(one, BorderPass):  # a user's pass may leave `requires` out
                self.runs.append(self._run(one))
        self.passed = self._finish()

    def for_twin(self, twin: Piece) -> Piece | None:
        """An equal piece after the passes; None where other weights of it can be merged."""
        names: dict[str, str] = dict(zip(self.piece.inputs, twin.inputs, strict=True))
        for indices, was_merged in self._asked:
            sources = [twin.inputs[index] for index in indices]
            one = self.whole.merge(sources, [storage_of_value(twin.fake_inputs[index]) for index in indices])
            if isinstance(one, str) == was_merged:
                return None
            if isinstance(one, MergedWeight):
                names["merged_" + "_".join(self.piece.inputs[i].removeprefix("weight_") for i in indices)] = one.name
        if self.passed is self.piece:
            return twin
        return replace(
            twin,
            graph_module=self.passed.graph_module,
            fake_inputs=self.passed.fake_inputs,
            inputs=tuple(names[name] for name in self.passed.inputs),
        )

    def _run(self, one: Pass) -> PassRun:
        if why_not := _why_skipped(one, self.settings):
            return PassRun(one.name, skipped=why_not)
        before = graph_copy(self.graph_module) if self.settings.check else None
        context = PassContext(
            region=self.settings.region,
            target_facts=self.settings.target_facts,
            weights=self.weights,
            fake_mode=self.fake_mode,
            fuel=self.settings.fuel,
            merge=self._merge,
        )
        started = time.perf_counter()
        try:
            rewrites = one.apply(self.graph, context)
            if type(rewrites) is not int:
                raise TypeError(f"apply gave {rewrites!r} instead of the number of its rewrites")
            if self.graph.find_nodes(op="placeholder") != list(self.names):
                raise TypeError("it adds or removes inputs (context.merge adds them)")
            if len(_outputs(self.graph)) != len(self.outputs):
                raise TypeError("it adds or removes outputs")
            if rewrites:
                update_values(self.graph, self.fake_mode)
                self.graph.lint()
                self.graph_module.recompile()
        except OnegraphError:
            raise
        except Exception as error:
            raise _failed(one, self.piece, error) from error
        if before is not None and not rewrites and str(before.graph) != str(self.graph):
            raise _failed(one, self.piece, TypeError("it changed the graph, and gave 0 as the number of its rewrites"))
        seconds = time.perf_counter() - started
        if rewrites:
            self.settings.observer(self.piece.index, one.name, self.graph_module)
            if before is not None:
                names = list(self.names.values())
                sources = {names.index(m.name): tuple(map(names.index, m.sources)) for m in self.added.values()}
                check_rewrite(one.name, self.piece, before, self.graph_module, sources)
        misses = dict.fromkeys(NearMiss(why, shapes.user_line(n.meta.get("stack_trace"))) for n, why in context.misses)
        return PassRun(one.name, rewrites, seconds, tuple(misses))

    def _merge(self, weights: Sequence[Node]) -> Node | str:
        """As PassContext.merge."""
        names = [self.names[node] for node in weights]
        one = self.whole.merge(names, list(map(storage_of, weights)))
        self._asked.append((tuple(map(self.piece.inputs.index, names)), isinstance(one, MergedWeight)))
        if isinstance(one, str):
            return one
        known = next((node for node, other in self.added.items() if other == one), None)
        if known is not None:
            return known
        with self.fake_mode, torch.no_grad():
            value = torch.cat([value_of(node) for node in weights])
        with self.graph.inserting_after(self.graph.find_nodes(op="placeholder")[-1]):
            node = self.graph.placeholder(one.name)
        node.meta = {"example_value": value}
        self.names[node], self.added[node] = one.name, one
        return node

    def _finish(self) -> Piece:
        """The piece with its new graph. Weights that nothing reads any more are no inputs of it."""
        if not any(run.rewrites for run in self.runs):
            return self.piece
        strided, names = self.whole.strided, self.piece.outputs
        if not _keep_layouts(self.graph, self.outputs, names, strided, self.fake_mode):
            self.runs = [replace(run, rewrites=0, skipped="an output's strides can't be kept") for run in self.runs]
            return self.piece
        for node in [*self.weights, *self.added]:
            if not node.users:
                self.graph.erase_node(node)
                del self.names[node]
        self.graph_module.recompile()
        return replace(
            self.piece,
            graph_module=self.graph_module,
            fake_inputs=tuple(value_of(node) for node in self.names),
            inputs=tuple(self.names.values()),
        )


def _failed(one: Pass | BorderPass, piece: Piece, error: Exception) -> CompileError:
    return CompileError(
        f"the pass {one.name} failed: {type(error).__name__}: {error}",
        where=f"piece {piece.index} {piece.module_path}",
        hint=f"-O.passes.{one.name}=false leaves it out",
    )


def _why_skipped(one: Pass | BorderPass, settings: PassSettings) -> str | None:
    missing = sorted(getattr(one, "requires", frozenset()) - settings.target_facts)
    if missing:
        return f"the target has no {', '.join(missing)}"
    if settings.fuel.left is not None and settings.fuel.left <= 0:
        return "no fuel is left"
    return None


def _rewrite_borders(
    one: BorderPass, split: SplitGraph, pieces: list[Piece], runs: list[tuple[PassRun, ...]], settings: PassSettings
) -> None:
    """Runs a pass over all neighbours, and puts what it makes of them, and its records, into the lists."""
    for index in range(len(pieces) - 1):
        before, after = pieces[index : index + 2]
        kept = any(piece.eager_why or piece.index in settings.left_alone for piece in (before, after))
        if (before.kind, after.kind) != ("compiled", "splitting_op") or kept:
            continue
        if why_not := _why_skipped(one, settings):
            runs[index] += (PassRun(one.name, skipped=why_not),)
            continue
        started = time.perf_counter()
        others = {name for piece in pieces if piece is not after for name in piece.inputs}
        others.update(result for result in split.results if isinstance(result, str))
        try:
            made = one.rewrite(Border(before, after, frozenset(before.outputs) & set(after.inputs) - others))
        except Exception as error:
            raise _failed(one, before, error) from error
        seconds = time.perf_counter() - started
        if isinstance(made, tuple) and settings.fuel.take():
            pieces[index : index + 2] = made
            runs[index] += (PassRun(one.name, 1, seconds),)
            for piece in made:
                settings.observer(piece.index, one.name, piece.graph_module)
        else:
            misses = (NearMiss(made),) if isinstance(made, str) else ()
            runs[index] += (PassRun(one.name, 0, seconds, misses),)


def _mode_of(piece: Piece) -> Any:
    """The mode of the graph's fake values: of its calls', where no input is a tensor."""
    values = (value_of(node) for node in piece.graph_module.graph.nodes)
    return fake_runs.mode_of(values, piece.fake_mode)


def _outputs(graph: Graph) -> list[Any]:
    (output,) = graph.find_nodes(op="output")
    return list(output.args[0])


def _keep_layouts(
    graph: Graph, before: Sequence[Any], outputs: Sequence[str], strided: frozenset[str], fake_mode: Any
) -> bool:
    """Lays outputs out as they were where a reader may rely on it: it was traced with these strides.

    One that has come to share its memory with another output gets memory of its own. `before` are the values of the
    outputs then. False where one isn't dense, and so can't be laid out again.
    """
    (output,) = graph.find_nodes(op="output")
    results = list(output.args[0])
    names = outputs if len(outputs) == len(results) else [""] * len(results)
    owners: dict[int | None, int | None] = {}
    for index, (node, was, name) in enumerate(zip(results, before, names, strict=True)):
        if name in strided or not isinstance(was, torch.Tensor):
            continue
        storage = storage_of_value(was)
        is_apart = owners.setdefault(storage_of(node), storage) == storage
        if is_apart and layout_of(was) == layout_of(value_of(node)):
            continue
        order = shapes.dense_order(was)
        if order is None:
            return False
        with graph.inserting_before(output):
            # Not `contiguous()`: a dim of one row may have any stride for it.
            in_order, memory = graph.call_method("permute", (node, order)), torch.contiguous_format
            dense = graph.call_method("clone", (in_order,), {"memory_format": memory})
            results[index] = graph.call_method("permute", (dense, [order.index(dim) for dim in range(len(order))]))
    if results != list(output.args[0]):
        output.args = (tuple(results), *output.args[1:])
        update_values(graph, fake_mode)
    return True


def _read_by_own_ops_alone(split: SplitGraph) -> frozenset[str]:
    """The values that only onegraph's own ops read, which take any strides."""
    results = {one for one in split.results if isinstance(one, str)}
    readers: dict[str, bool] = {}
    for piece in split.pieces:
        nodes = piece.graph_module.graph.find_nodes(op="placeholder")
        for node, name in zip(nodes, piece.inputs, strict=True):
            own = piece.kind == "splitting_op" and all(called(user).startswith("onegraph::") for user in node.users)
            readers[name] = readers.get(name, True) and own
    return frozenset(name for name, own in readers.items() if own and name not in results)
