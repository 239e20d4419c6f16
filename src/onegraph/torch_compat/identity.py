"""Questions of identity between tensors (`a is b`, a tensor as a key) that tracing answers for good, with no guard.

Torch's own guards assume that tensors of a call which are different objects stay so; between tensors of the module,
or one of them and an argument, nothing says that a trace depends on it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch._dynamo.variables import builtin
from torch._dynamo.variables.tensor import TensorVariable
from torch._guards import TracingContext

from onegraph.torch_compat.shapes import is_torch_file


@dataclass(frozen=True)
class ComparedTensors:
    """Two tensors that the traced code compared, as the sources of guards; `user` is the `file:line`."""

    left: str
    right: str
    user: str | None


@contextmanager
def compared_tensors() -> Iterator[list[ComparedTensors]]:
    """Collects the pairs of different tensors with a source that are compared by identity in the traces inside.

    Tensors that are hashed are taken as compared with one another.
    """
    found: list[ComparedTensors] = []
    hashed: list[str] = []
    example_value, hash_impl = builtin.extract_fake_example_value, TensorVariable.hash_impl

    def noted(left: Any, right: Any) -> None:
        if left is not None and right is not None and left != right:
            frames = [f for f in TracingContext.extract_stack() if not is_torch_file(f.filename)]
            user = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
            found.append(ComparedTensors(left, right, user))

    def extract(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1)
        if caller.f_code.co_name == "_comparison_with_tensor":  # whose handlers are bound before any hook
            noted(_source(caller.f_locals["left"]), _source(caller.f_locals["right"]))
        return example_value(*args, **kwargs)

    def hashing(self: Any, tx: Any) -> Any:
        source = _source(self)
        for other in hashed:
            noted(other, source)
        if source is not None and source not in hashed:
            hashed.append(source)
        return hash_impl(self, tx)

    builtin.extract_fake_example_value = extract
    TensorVariable.hash_impl = hashing  # type: ignore[method-assign]
    try:
        yield found
    finally:
        builtin.extract_fake_example_value = example_value
        TensorVariable.hash_impl = hash_impl  # type: ignore[method-assign]


def _source(variable: Any) -> str | None:
    source = getattr(variable, "source", None)
    return None if source is None else source.name
