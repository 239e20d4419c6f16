"""A module that runs as it is, watched: which tensors it has, where they stand, and what of its Python state is known.

Takes an nn.Module, a method of one, or a function. Gives the tensors as they are now, and tells what has changed.
Simple values of modules (numbers, texts, None) are compared, with the modules themselves; what a method reads elsewhere
isn't seen.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from onegraph.ir.ledger import StateEntry
from onegraph.torch_compat.recordable import storage_key
from onegraph.torch_compat.tensor_checks import KindCheck, tensor_facts

_SIMPLE = (bool, int, float, str, type(None))
_REGISTERED = ("_parameters", "_buffers")


@dataclass(frozen=True)
class Place:
    """Where a tensor stands; `name` is what people call it."""

    name: str
    read: Callable[[], Any]


class WatchedModule:
    """The module with its registered tensors; `watch` adds others."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._owner = getattr(module, "__self__", module)
        self._function = getattr(module, "__func__", module)
        self._submodules = list(self._named_modules())
        self.places = list(self._registered())
        self._facts = self._values()
        self._note_kinds()

    def tensors(self) -> list[Any]:
        """What stands in the places now."""
        return [place.read() for place in self.places]

    def watch(self, tensor: torch.Tensor) -> bool:
        """Adds the place of a tensor's memory, if it is an attribute of a module, or in a closure or a global."""
        found = next((place for place in self._others() if _shows(place.read(), tensor)), None)
        if found is not None:
            self.places.append(found)
            self._note_kinds()
        return found is not None

    def holds(self) -> bool:
        """Whether all is as it was, but for the addresses and values of tensors."""
        try:
            tensors = self.tensors()
        except (KeyError, IndexError):  # one is gone
            return False
        if any(map(operator.is_not, tensors, self._known)):
            if list(map(tensor_facts, tensors)) != self._same_kinds.facts:
                return False
            self._note_kinds()
        return self._same_kinds(tensors) and self._values() == self._facts

    def changes(self) -> tuple[tuple[StateEntry, str], ...]:
        """What isn't, with what it is now."""
        now = self._values()
        names = [name for name in {**self._facts, **now} if self._facts.get(name, "") != now.get(name, "")]
        changed = [(name, _told(self._facts, name), _told(now, name)) for name in names]
        if not changed:
            changed = [("a parameter or buffer", "of another kind", "replaced")]
        return tuple((StateEntry(name, was), value) for name, was, value in changed)

    def _note_kinds(self) -> None:
        self._known = self.tensors()
        self._same_kinds = KindCheck(self._known)

    def _named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        if isinstance(self._owner, torch.nn.Module):
            yield from self._owner.named_modules()

    def _registered(self) -> Iterator[Place]:
        for prefix, module in self._submodules:
            for kind in _REGISTERED:
                held: Mapping[str, Any] = vars(module)[kind]
                for key, value in held.items():
                    if value is not None:
                        yield Place(f"{prefix}.{key}".lstrip("."), partial(operator.getitem, held, key))

    def _values(self) -> dict[str, Any]:
        """What is compared."""
        found: dict[str, Any] = {}
        for prefix, module in self._submodules:
            for key, value in vars(module).items():
                if isinstance(value, _SIMPLE):
                    found[f"{prefix}.{key}".lstrip(".")] = value
            for key, child in vars(module)["_modules"].items():
                found[f"{prefix}.{key}".lstrip(".")] = id(child)
        for name, cell in self._cells():
            if isinstance(cell.cell_contents, _SIMPLE):
                found[name] = cell.cell_contents
        return found

    def _cells(self) -> Iterator[tuple[str, types.CellType]]:
        function = self._function
        if isinstance(function, types.FunctionType):
            yield from zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)

    def _others(self) -> Iterator[Place]:
        """Tensors that stand where modules and functions keep things, but aren't registered."""
        for prefix, module in self._submodules:
            held = vars(module)
            for key in held.keys() - {*_REGISTERED, "_modules"}:
                yield from _within(f"{prefix}.{key}".lstrip("."), partial(operator.getitem, held, key))
        for name, cell in self._cells():
            yield from _within(name, partial(getattr, cell, "cell_contents"))
        for function in (self._function, *(getattr(type(one), "forward", None) for _, one in self._submodules)):
            if isinstance(function, types.FunctionType):
                spelled = function.__globals__
                for name in spelled.keys() & set(function.__code__.co_names):
                    yield from _within(name, partial(operator.getitem, spelled, name))


def _within(name: str, read: Callable[[], Any]) -> Iterator[Place]:
    """The tensor that stands there, or those in a container that does."""
    value = read()
    if isinstance(value, torch.Tensor):
        yield Place(name, read)
    elif isinstance(value, dict | list | tuple):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(one, torch.Tensor):
                yield Place(f"{name}[{key!r}]", partial(_item, read, key))


def _item(read: Callable[[], Any], key: Any) -> Any:
    return read()[key]


def _shows(value: Any, tensor: torch.Tensor) -> bool:
    is_plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return is_plain and storage_key(value) == storage_key(tensor)


def _told(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "not there"
