"""`onegraph::largest` on the CPU: a C++ kernel; dtypes beside fp32 and bf16 are left to the reference in `ops`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from onegraph.ops import largest as reference

_MAX_NUMBERS = 1 << 31
"""The kernel counts places in 32 bits."""


def implementations(library: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """By op name."""
    return {"largest": functools.partial(_largest, library["largest"])}


def _largest(find: Callable[..., None], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, (num_rows, num_numbers), strides = x.dtype, x.shape, x.stride()
    if not ((dtype is torch.bfloat16 or dtype is torch.float32) and strides[1] == 1 and 0 < num_numbers < _MAX_NUMBERS):
        return reference.largest(x)
    indices = x.new_empty(num_rows, dtype=torch.int64)
    find(indices, x, num_rows, num_numbers, strides[0], torch.get_num_threads(), dtype is torch.bfloat16)
    return x.gather(1, indices[:, None])[:, 0], indices
