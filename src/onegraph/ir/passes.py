"""Passes: rewrites of a piece's graph between split and compile, and the records of what they did.

A pass is a frozen dataclass whose fields are its options. It changes a graph in place and gives the number of its
rewrites; whatever else it needs to know or to say goes through its PassContext.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from onegraph.ir.fx_nodes import storage_of, value_of
from onegraph.ir.piece import Piece
from onegraph.ir.region import Region


class Pass(Protocol):
    """A rewrite of graphs.

    `name` is its flag and its log line; `requires` are the facts that a target must declare, such as `linear_kernels`.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]

    def apply(self, graph: Graph, context: PassContext) -> int:
        """Rewrites the graph in place, and gives the number of rewrites.

        Asks `context.may_rewrite()` before each. What it replaces it erases; nodes that it makes by `context.call` have
        fake values, and the runner works out those of the rest.
        """
        ...


@dataclass(frozen=True)
class Border:
    """A compiled piece and the splitting ops after it. `private` are the values that only those read."""

    before: Piece
    after: Piece
    private: frozenset[str]


@runtime_checkable
class BorderPass(Protocol):
    """A rewrite of two neighbours at once, after all passes that take a piece for itself."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]

    def rewrite(self, border: Border) -> tuple[Piece, Piece] | str | None:
        """New pieces for both, with graphs of their own; or why they nearly matched; or None.

        A value that becomes another one gets another name. What the pieces return and change together stays.
        """
        ...


@dataclass(frozen=True)
class NearMiss:
    """A place that nearly matched: why it was left as it is, and the user's line."""

    why: str
    where: str | None = None


@dataclass(frozen=True)
class PassRun:
    """One pass over one piece. `skipped` says why it didn't run, where it didn't."""

    name: str
    rewrites: int = 0
    seconds: float = 0.0
    near_misses: tuple[NearMiss, ...] = ()
    skipped: str | None = None


@dataclass
class Fuel:
    """How many rewrites are left; None is no limit. For finding the rewrite that is wrong, by halving."""

    left: int | None = None

    def take(self) -> bool:
        """Uses one up; False where there is none."""
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0


@dataclass
class PassContext:
    """What a pass may know of the piece that its graph belongs to, and what it may ask for.

    `region` is the sizes for which the graph is right, None below torch.compile; `hints` what code is tuned for, by
    dim; `target_facts` what the device's target declares; `weights` the inputs that are the module's own tensors, by
    their names there.
    """

    region: Region | None
    target_facts: frozenset[str]
    weights: Mapping[Node, str]
    fake_mode: Any
    fuel: Fuel = field(default_factory=Fuel)
    merge: Callable[[Sequence[Node]], Node | str] = lambda nodes: "nobody owns the weights"
    """`merge(weights)` gives an input whose rows are those of the weights, in order; or why there can't be one."""
    misses: list[tuple[Node, str]] = field(default_factory=list)
    """What `missed` was told."""

    @property
    def hints(self) -> Mapping[str, int]:
        return {} if self.region is None else dict(self.region.hints)

    def may_rewrite(self) -> bool:
        """Whether one more rewrite is allowed; uses up fuel."""
        return self.fuel.take()

    def missed(self, node: Node, why: str) -> None:
        """Records that the node nearly matched."""
        self.misses.append((node, why))

    def call(self, target: Callable[..., Any] | str, args: tuple[Any, ...], like: Node, **kwargs: Any) -> Node:
        """Adds a call at the graph's insertion point (a method where `target` is a string), with its fake value.

        `like` is the node whose place in the user's code it takes. Raises what the call raises on fake tensors.
        """
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = like.graph.create_node(kind, target, args, kwargs)
        node.meta = {key: value for key, value in like.meta.items() if key not in ("example_value", "val")}
        try:
            node.meta["example_value"] = fake_result(node, self.fake_mode)
        except Exception:
            like.graph.erase_node(node)
            raise
        return node

    def replace_all(self, pairs: Mapping[Node, Node]) -> None:
        """Has each new node stand for an old one, which is erased, and works out the values of what follows.

        Raises what a user raises that doesn't take a new node's layout; then nothing is erased.
        """
        for old, new in pairs.items():
            old.replace_all_uses_with(new)
        update_values(next(iter(pairs)).graph, self.fake_mode, pairs.values())
        for old in pairs:
            old.graph.erase_node(old)


def update_values(graph: Graph, fake_mode: Any, changed: Iterable[Node] = ()) -> None:
    """Works out the fake values of calls that have none, and of those that other memory or another layout reaches.

    `changed` are nodes whose users take a new value. A call that makes new symbols (`nonzero`) keeps its value. Raises
    what a call raises that doesn't take the new layout.
    """
    reached = set(changed)
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        missing = "example_value" not in node.meta and "val" not in node.meta
        before = value_of(node)
        if not missing and (reached.isdisjoint(node.all_input_nodes) or makes_symbols(node)):
            continue
        node.meta["example_value"] = fake_result(node, fake_mode)
        is_view = storage_of(node) in map(storage_of, node.all_input_nodes)
        if missing or is_view or layout_of(before) != layout_of(value_of(node)):
            reached.add(node)


def layout_of(value: Any) -> tuple[Any, ...] | None:
    """Sizes, strides, dtype and device of a tensor; None for anything else.

    Sizes are text, so that comparing them asks nothing of their symbols, which would make a condition of the graph.
    """
    if not isinstance(value, torch.Tensor):
        return None
    return (str(tuple(value.shape)), str(value.stride()), value.dtype, value.device)


def makes_symbols(node: Node) -> bool:
    """Whether a call's value has sizes that none of its arguments has."""
    given = set().union(*(_symbols(value_of(argument)) for argument in node.all_input_nodes))
    return not _symbols(value_of(node)) <= given


def _symbols(value: Any) -> set[Any]:
    if isinstance(value, tuple | list):
        return set().union(*map(_symbols, value))
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return {symbol for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}


def graph_copy(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """With a graph of its own; fake values are shared."""
    graph = Graph()
    output = graph.graph_copy(graph_module.graph, {})
    graph.output(output)
    return torch.fx.GraphModule(graph_module, graph, class_name=type(graph_module).__name__)


def fake_result(node: Node, fake_mode: Any) -> Any:
    """What a call gives on the fake values of its arguments."""
    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    with fake_mode, torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)
