"""Where a view of an input lies in it, as Python text over the graph's inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._sympy.printers import PythonPrinter

from onegraph.torch_compat.shapes import expression, is_plain_symbol


def view_place(view: torch.Tensor, base: torch.Tensor, inputs: Sequence[Any], shape_env: Any) -> str | None:
    """A tuple over `args`, the graph's inputs: the view's strides, then the bytes from where `base` begins.

    `view` and `base` are symbolic values. None where a size in it is none of the inputs', nor of their dims.
    """
    known: dict[str, str] = {}
    for index, value in enumerate(inputs):
        sizes = enumerate(value.shape) if isinstance(value, torch.Tensor) else [(None, value)]
        for dim, size in sizes:
            if is_plain_symbol(size):
                shown = f"args[{index}]" if dim is None else f"args[{index}].shape[{dim}]"
                known.setdefault(str(expression(size, shape_env)), shown)
    texts = []
    num_bytes = view.storage_offset() * view.itemsize - base.storage_offset() * base.itemsize
    for number in (*view.stride(), num_bytes):
        expr = expression(number, shape_env)
        if not {str(symbol) for symbol in expr.free_symbols} <= known.keys():
            return None
        texts.append(re.sub(r"\b[su]\d+\b", lambda found: known[found[0]], PythonPrinter().doprint(expr)))
    return f"({', '.join(texts)},)"
