"""Weights as inputs: the tensors that Dynamo installed on the graph become placeholders with a place to read.

Takes Dynamo's graph module; gives a copy with the weights lifted in front of the inputs. Dynamo's own graph
stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from onegraph.ir.graph import WeightInput


def lift_weights(
    graph_module: torch.fx.GraphModule, function: Any, owner: Any
) -> tuple[torch.fx.GraphModule, tuple[WeightInput, ...]]:
    """Each tensor attribute that the graph reads becomes one placeholder, in order of first use.

    `function` is the traced function and `owner` its `self`, or None. A tensor that neither of them holds is
    bound as it is.
    """
    places = dict(_places(function, owner))
    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    by_tensor: dict[int, torch.fx.Node] = {}
    weights: list[WeightInput] = []
    for node in graph_module.graph.find_nodes(op="get_attr"):
        tensor = _attribute(graph_module, str(node.target))
        if not isinstance(tensor, torch.Tensor):
            continue
        if id(tensor) not in by_tensor:
            name, holder, key = places.get(id(tensor), (str(node.target), {"": tensor}, ""))
            placeholder = graph.placeholder(f"weight_{len(weights)}")
            placeholder.meta = dict(node.meta)
            by_tensor[id(tensor)] = placeholder
            weights.append(WeightInput(name, holder, key))
        values[node] = by_tensor[id(tensor)]
    for node in graph_module.graph.nodes:
        if node not in values:
            values[node] = graph.node_copy(node, lambda n: values[n])
    return torch.fx.GraphModule(graph_module, graph), tuple(weights)


def _attribute(module: Any, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part)
    return module


def weight_places(function: Any, owner: Any) -> dict[str, tuple[Any, Any]]:
    """Name -> (holder, key) for every tensor that the function can reach; without names that stand for two places."""
    places: dict[str, tuple[Any, Any]] = {}
    twice: set[str] = set()
    for _, (name, holder, key) in _places(function, owner):
        known = places.setdefault(name, (holder, key))
        if known[0] is not holder and not isinstance(holder, _Cells):
            twice.add(name)
    return {name: place for name, place in places.items() if name not in twice}


class _Cells:
    """A function's closure as a mapping from variable names to what they hold now."""

    def __init__(self, function: Any) -> None:
        self.cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def __getitem__(self, name: str) -> Any:
        return self.cells[name].cell_contents


def _places(function: Any, owner: Any) -> Iterator[tuple[int, tuple[str, Any, Any]]]:
    """(id of tensor, (name, holder, key)) for every tensor that the function can reach by name.

    Later pairs win, so that a tensor in the module is told by its place there rather than by a global.
    """
    for name in function.__code__.co_names:
        if isinstance(value := function.__globals__.get(name), torch.Tensor):
            yield id(value), (name, function.__globals__, name)
        elif isinstance(value, torch.nn.Module):
            yield from _module_places(value, f"{name}.")
    cells = _Cells(function)
    for name, cell in cells.cells.items():
        value = _contents(cell)
        if isinstance(value, torch.Tensor):
            yield id(value), (name, cells, name)
        if isinstance(value, torch.nn.Module):
            yield from _module_places(value, f"{name}.")
    if isinstance(owner, torch.nn.Module):
        yield from _module_places(owner, "")
    elif hasattr(owner, "__dict__"):
        for name, value in vars(owner).items():
            if isinstance(value, torch.Tensor):
                yield id(value), (f"self.{name}", vars(owner), name)
            elif isinstance(value, torch.nn.Module):
                yield from _module_places(value, f"self.{name}.")


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _module_places(module: torch.nn.Module, prefix: str) -> Iterator[tuple[int, tuple[str, Any, Any]]]:
    for module_name, child in module.named_modules():
        path = f"{prefix}{module_name}." if module_name else prefix
        for holder in (vars(child), child._buffers, child._parameters):
            for name, value in holder.items():
                if isinstance(value, torch.Tensor):
                    yield id(value), (f"{path}{name}", holder, name)
