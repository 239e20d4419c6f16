"""`onegraph::largest`: the largest number of each row and where it stands. The reference.

Letters: S rows, V numbers in a row.
"""

from __future__ import annotations

import torch

from onegraph.ops.library import define


def largest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [S, V], V > 0, of any float dtype. Gives (values [S] of x's dtype, indices int64 [S]).

    Of equal numbers the first counts; NaN is larger than any number.
    """
    values = x.amax(-1)
    is_largest = torch.where(values.isnan()[:, None], x.isnan(), x == values[:, None])
    return values, is_largest.to(torch.uint8).argmax(-1)


def _fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0]), x.new_empty(x.shape[0], dtype=torch.int64)


define("largest(Tensor x) -> (Tensor, Tensor)", largest, _fake)
