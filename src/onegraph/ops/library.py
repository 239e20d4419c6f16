"""The torch library `onegraph`, and how an op gets into it.

An op is defined with a reference in plain PyTorch, for any device. Targets have faster ones for their own, which lie
above this package and are put in with `implement` (see `op_kernels.py`).

Through `torch.library.Library` and not `custom_op`: the latter adds about 20 microseconds to every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("onegraph", "DEF")

_implemented: dict[tuple[str, str], Callable[..., Any]] = {}


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op for all devices, with the function that stands for it while shapes are traced."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"onegraph::{name}", fake, lib=LIBRARY)


def implement(name: str, dispatch_key: str, implementation: Callable[..., Any]) -> None:
    """Puts a device's implementation before the one that `define` got; torch's dispatcher picks it by dispatch key.

    For the process's life, and once for each op and key. One with a result takes `out` too, memory that it may use for
    the result, which the dispatcher never gives it. While shapes are traced, the fake stands for it as before.
    """
    LIBRARY.impl(name, implementation, dispatch_key)
    _implemented[name, dispatch_key] = implementation


def implementation(name: str, dispatch_key: str) -> Callable[..., Any] | None:
    """What `implement` has put there: what the dispatcher calls for plain tensors of that device."""
    return _implemented.get((name, dispatch_key))
