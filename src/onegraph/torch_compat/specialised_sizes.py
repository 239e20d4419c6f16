"""The same graph for fewer sizes: its symbols replaced by numbers, or kept with a narrower range.

Takes a graph, its symbolic inputs, and a range for each of their symbols. Gives a copy of the graph whose values are
worked out again from new inputs, in a fake mode of their own. Symbols that stay keep their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from onegraph.torch_compat import shapes
from onegraph.torch_compat.overlap import share_storage

SymbolRange = tuple[int, int, int]
"""The least and the greatest value of a symbol, and the one that code is tuned for."""


_OF_OTHER_SIZES = ("example_value", "unbacked_bindings")


class NotSpecialisedError(Exception):
    """The graph can't be made for fewer sizes; the text says why."""


@dataclass(frozen=True)
class SpecialisedGraph:
    """What stands in a piece's place for fewer sizes."""

    graph_module: torch.fx.GraphModule
    fake_inputs: tuple[Any, ...]
    fake_mode: FakeTensorMode


def specialised_graph(
    graph_module: torch.fx.GraphModule,
    fake_inputs: Sequence[Any],
    fake_mode: FakeTensorMode,
    ranges: Mapping[str, SymbolRange],
) -> SpecialisedGraph:
    """The graph for the `ranges` of its symbols, by their names; a range of one value makes a constant.

    What the graph's shape environment knows about sizes is known in the new one, too. Raises NotSpecialisedError.
    """
    old, env = fake_mode.shape_env, ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=fake_mode.allow_non_fake_inputs)
    _refuse_unusual([value for value in fake_inputs if isinstance(value, torch.Tensor)])
    if any(node.meta.get("unbacked_bindings") for node in graph_module.graph.nodes if node.op != "placeholder"):
        raise NotSpecialisedError("a size in it depends on data")
    values = _values(env, old, fake_inputs, ranges)

    def size(value: Any) -> Any:
        if not shapes.is_symbolic(value):
            return value
        if not isinstance(value, torch.SymInt):
            raise NotSpecialisedError("an input is computed from a size, and isn't a whole number")
        expr = shapes.expression(value, old).xreplace(values)
        return int(expr) if expr.is_Integer else env.create_symintnode(expr, hint=None)

    def anew(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return size(value)
        shape, strides = [size(length) for length in value.shape], [size(step) for step in value.stride()]
        with mode:
            fresh = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
            return torch.nn.Parameter(fresh, requires_grad=False) if isinstance(value, torch.nn.Parameter) else fresh

    copy = _copied(graph_module)
    try:
        for condition in shapes.conditions(old):
            expr = old.replace(condition.expr).xreplace(values)
            if {str(symbol) for symbol in expr.free_symbols} <= ranges.keys():
                env.guard_or_defer_runtime_assert(expr, "known of the whole range")
        with torch.no_grad(), mode, enable_python_dispatcher():
            _Remembering(copy).run(*map(anew, fake_inputs))  # an operation may change an input's shape in place
    except Exception as error:
        told = (str(error).splitlines() or [""])[0]
        raise NotSpecialisedError(f"{type(error).__name__}: {told}") from error
    return SpecialisedGraph(copy, tuple(map(anew, fake_inputs)), mode)


def _refuse_unusual(tensors: list[torch.Tensor]) -> None:
    if share_storage(tensors, {}):
        raise NotSpecialisedError("inputs of the piece share memory")
    for tensor in tensors:
        if type(tensor) is not FakeTensor or tensor.layout != torch.strided:
            raise NotSpecialisedError("an input is no plain tensor")
        if type(tensor.storage_offset()) is not int or tensor.storage_offset() != 0:
            raise NotSpecialisedError("an input begins inside of other memory")


def _values(
    env: ShapeEnv, old: ShapeEnv, fake_inputs: Sequence[Any], ranges: Mapping[str, SymbolRange]
) -> dict[sympy.Symbol, Any]:
    """What stands for each symbol of the inputs in the new environment."""
    names = shapes.symbols_of(fake_inputs, old)
    symbols = [symbol for symbol in old.var_to_range if str(symbol) in names]
    values: dict[sympy.Symbol, Any] = {}
    for symbol in symbols:
        if str(symbol) not in ranges:
            raise NotSpecialisedError(f"the size {symbol} is no declared dim")
        least, most, hint = ranges[str(symbol)]
        if least == most:
            values[symbol] = sympy.Integer(least)
            continue
        number = re.fullmatch(r"u(\d+)", str(symbol))
        if number is None:
            raise NotSpecialisedError("a backed size can be made a number, and not another range")
        env.unbacked_symint_counter = int(number[1])  # so that the symbol keeps its name
        with env.ignore_fresh_unbacked_symbols():
            new = env.create_unbacked_symint().node.expr
        env._constrain_range_for_size(new, least, most)
        env.var_to_hint_override[new] = hint
        env.unbacked_inputs.add(new)
        values[symbol] = new
    return values


def _copied(graph_module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    results = graph.graph_copy(graph_module.graph, copies)
    graph.output(results)
    for node, copy in copies.items():
        copy.meta = {key: value for key, value in node.meta.items() if key not in _OF_OTHER_SIZES}
    return torch.fx.GraphModule(graph_module, graph, class_name=type(graph_module).__name__)


class _Remembering(torch.fx.Interpreter):
    """Puts each value into the node's `example_value`, where a trace has it."""

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            n.meta["example_value"] = result
        return result
