"""What residual code writes of the objects that were there before the call, as Dynamo notes it while tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch._dynamo.exc import Unsupported
from torch._dynamo.side_effects import SideEffects
from torch._dynamo.source import LocalCellSource
from torch._dynamo.variables.base import AttributeMutationExisting


@dataclass(frozen=True)
class Effect:
    """A write to the object at `source`: to one attribute, or to its contents, as of a list or an iterator.

    `source` is an expression as in a guard; for the cell of a closure variable, its `cell_contents` are written.
    """

    source: str
    attribute: str | None


@contextmanager
def effects() -> Iterator[list[Effect]]:
    """Collects the effects of the traces inside, each once. Objects that the traced code made are left out."""
    found: dict[Effect, None] = {}
    store_attribute, mutate = SideEffects.store_attr, SideEffects.mutation

    def stored(self: Any, item: Any, name: str, *args: Any, **kwargs: Any) -> None:
        if item.source is not None and isinstance(item.mutation_type, AttributeMutationExisting):
            if isinstance(item.source, LocalCellSource):  # it has no expression
                variable = item.source.local_name
                raise Unsupported(f"the traced function assigns {variable!r}, a variable of the function around it")
            found.setdefault(Effect(item.source.name, name))
        store_attribute(self, item, name, *args, **kwargs)

    def mutated(self: Any, var: Any) -> None:
        if var.source is not None and var not in self.ignore_mutation_on_these_variables:
            found.setdefault(Effect(var.source.name, None))
        mutate(self, var)

    written: list[Effect] = []
    with ExitStack() as hooks:
        for name, before, replacement in (
            ("store_attr", store_attribute, stored),
            ("mutation", mutate, mutated),
        ):
            hooks.callback(setattr, SideEffects, name, before)
            setattr(SideEffects, name, replacement)
        yield written
    written.extend(found)
