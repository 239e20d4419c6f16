"""Padding policies: what stands in the rows of an input behind those of the call.

`keep` leaves what is there, `zero` is zeros, `last` repeats the last row of the call, a number is a sentinel, such as a
slot of -1, which writes nothing. Engines fill arrays with it, and recordings of library calls tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from onegraph.ir.padding import Policy


def fill_padding(whole: Any, lengths: Mapping[int, int], policy: Policy) -> None:
    """Fills a tensor or array behind the first `lengths[dim]` rows of each dim that is padded.

    With `last` there has to be a row.
    """
    if policy == "keep":
        return
    for dim, length in lengths.items():
        if length == whole.shape[dim]:
            continue
        before = (slice(None),) * dim
        last = (*before, slice(length - 1, length))
        whole[(*before, slice(length, None))] = whole[last] if policy == "last" else 0 if policy == "zero" else policy


def fits(policy: Policy, dtype: torch.dtype) -> bool:
    """Whether a tensor of the dtype can hold the policy's number, to the digit; any can where it is none."""
    if isinstance(policy, str):
        return True
    if dtype.is_floating_point or dtype.is_complex:
        most = torch.finfo(dtype).max
        return bool(-most <= policy <= most and torch.tensor(float(policy), dtype=dtype).item() == policy)
    if dtype is torch.bool:
        return policy in (0, 1)
    limits = torch.iinfo(dtype)
    return bool(limits.min <= policy <= limits.max)
