"""`onegraph::grouped_linear`: each row times the weight of its own expert. The reference.

The rows of an expert are taken together, so weights are read where they lie and never copied to the rows.

Letters: S rows, E experts, I input size, O output size.
"""

from __future__ import annotations

import torch

from onegraph.ops.library import define


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    """Row s of the result [S, O] is `weight[expert_ids[s]] @ x[s]`.

    x [S, I]; weight [E, O, I], of x's dtype, any strides; expert_ids int64 [S], each in 0..E - 1.
    """
    out = x.new_empty(x.shape[0], weight.shape[1])
    order = expert_ids.argsort(stable=True)
    sizes = torch.bincount(expert_ids, minlength=weight.shape[0]).tolist()
    for expert, rows in enumerate(order.split(sizes)):
        if len(rows):
            out[rows] = x[rows] @ weight[expert].T
    return out


def _fake(x: torch.Tensor, weight: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


define("grouped_linear(Tensor x, Tensor weight, Tensor expert_ids) -> Tensor", grouped_linear, _fake, by_values=True)
