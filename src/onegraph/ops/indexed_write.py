"""`onegraph::index_copy` and `onegraph::index_put`: rows written into a view, as ops that say so in their schema.

Functionalisation turns an in-place write to a view into a copy of the whole base and a write back; an op that
declares its mutation is run on the view itself.
"""

from __future__ import annotations

import torch

from onegraph.ops.library import define


def index_copy(target: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> None:
    """`target.index_copy_(dim, index, source)`: any dtype; index int64 [I], source with I at `dim`."""
    target.index_copy_(dim, index, source)


def index_put(target: torch.Tensor, index: torch.Tensor, values: torch.Tensor, accumulate: bool) -> None:
    """`target.index_put_((index,), values, accumulate)`: index int64 or bool, values broadcast to the indexed shape."""
    target.index_put_((index,), values, accumulate)


def _fake_index_copy(target: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor) -> None:
    return None


def _fake_index_put(target: torch.Tensor, index: torch.Tensor, values: torch.Tensor, accumulate: bool) -> None:
    return None


define("index_copy(Tensor(a!) target, int dim, Tensor index, Tensor source) -> ()", index_copy, _fake_index_copy)
define("index_put(Tensor(a!) target, Tensor index, Tensor values, bool accumulate) -> ()", index_put, _fake_index_put)
