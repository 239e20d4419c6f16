"""What tracing asks of a tensor beside its values and sizes, and answers once and for all: class, gradient, history.

Torch guards these for tensors that carry gradients through a backward pass. Here inputs are traced without, so that
the answers are the trace's alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.variables.tensor import TensorVariable
from torch._guards import TracingContext

from onegraph.ir.traced import GuardFact
from onegraph.torch_compat.shapes import is_torch_file

_ATTRIBUTES = frozenset({"requires_grad", "is_leaf", "grad_fn", "retains_grad", "output_nr", "name"})


@contextmanager
def tensor_questions() -> Iterator[list[GuardFact]]:
    """Collects what the traces inside ask of tensors with a source, as facts: attributes, and the class as `type(x)`.

    `isinstance` counts where a Parameter and a plain tensor differ in it.
    """
    found: list[GuardFact] = []
    getattr_of, type_of = TensorVariable.var_getattr, TensorVariable.python_type

    def note(variable: Any, text: str, kind: str) -> None:
        source = getattr(variable, "source", None)
        if isinstance(variable, TensorVariable) and source is not None:
            frames = [f for f in TracingContext.extract_stack() if not is_torch_file(f.filename)]
            user = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
            found.append(GuardFact(text.format(source.name), kind, user, {}))

    def var_getattr(self: Any, tx: Any, name: str) -> Any:
        if name in _ATTRIBUTES:
            note(self, f"{{}}.{name}", "CONSTANT_MATCH")
        elif name == "__class__":
            note(self, "{}", "TYPE_MATCH")
        return getattr_of(self, tx, name)

    def python_type(self: Any) -> Any:
        caller = sys._getframe(1)  # Dynamo's handlers of builtins are bound before any hook
        asks, scope = caller.f_code.co_name, caller.f_locals
        if asks == "call_type" or (
            asks == "call_isinstance" and _tells_parameters(scope["isinstance_type_var"].as_python_constant())
        ):
            note(self, "{}", "TYPE_MATCH")
        return type_of(self)

    TensorVariable.var_getattr = var_getattr  # type: ignore[method-assign]
    TensorVariable.python_type = python_type  # type: ignore[method-assign]
    try:
        yield found
    finally:
        TensorVariable.var_getattr = getattr_of  # type: ignore[method-assign]
        TensorVariable.python_type = type_of  # type: ignore[method-assign]


def _tells_parameters(classes: Any) -> bool:
    """Whether one of the classes has parameters and not plain tensors, or the other way round."""
    given = classes if isinstance(classes, tuple) else (classes,)
    return any(
        issubclass(torch.nn.Parameter, one) and not issubclass(torch.Tensor, one)
        for one in given
        if isinstance(one, type)
    )
