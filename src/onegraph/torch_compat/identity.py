"""What tracing decides by identity, once and for all: objects that stand at two places, tensors compared by `is`.

Torch guards the first where both places are locals or both are globals, and takes the second for settled: its
guards assume that tensors of a call which are different objects stay so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch._dynamo.variables import builder, builtin
from torch._dynamo.variables.tensor import TensorVariable
from torch._guards import TracingContext

from onegraph.ir.traced import Places
from onegraph.torch_compat.shapes import is_torch_file

_HASH = "hash_impl" if hasattr(TensorVariable, "hash_impl") else "get_python_hash"
"""Torch 2.11's name for what hashes a traced tensor is the second."""


@dataclass(frozen=True)
class Identities:
    """`same` are places of one object; `compared` are places of tensors that the traced code took for two.

    Tensors that are hashed are taken as compared with one another.
    """

    same: list[Places]
    compared: list[Places]


@contextmanager
def identities() -> Iterator[Identities]:
    """Collects what the traces inside decide by identity."""
    found = Identities([], [])
    hashed: list[str] = []
    example_value, hash_of, dupe_guard = (
        builtin.extract_fake_example_value,
        getattr(TensorVariable, _HASH),
        builder.make_dupe_guard,
    )

    def noted(pairs: list[Places], left: str | None, right: str | None) -> None:
        if left is not None and right is not None and left != right:
            frames = [f for f in TracingContext.extract_stack() if not is_torch_file(f.filename)]
            pairs.append(Places(left, right, f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None))

    def seen_before(obj_source: Any, dupe_source: Any) -> Any:
        noted(found.same, obj_source.name, None if dupe_source is None else dupe_source.name)
        return dupe_guard(obj_source, dupe_source)

    def extract(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1)
        if caller.f_code.co_name == "_comparison_with_tensor":  # whose handlers are bound before any hook
            noted(found.compared, _source(caller.f_locals["left"]), _source(caller.f_locals["right"]))
        return example_value(*args, **kwargs)

    def hashing(self: Any, *args: Any) -> Any:
        source = _source(self)
        for other in hashed:
            noted(found.compared, other, source)
        if source is not None and source not in hashed:
            hashed.append(source)
        return hash_of(self, *args)

    builtin.extract_fake_example_value = extract
    setattr(TensorVariable, _HASH, hashing)
    builder.make_dupe_guard = seen_before
    try:
        yield found
    finally:
        builtin.extract_fake_example_value = example_value
        setattr(TensorVariable, _HASH, hash_of)
        builder.make_dupe_guard = dupe_guard


def _source(variable: Any) -> str | None:
    source = getattr(variable, "source", None)
    return None if source is None else source.name
