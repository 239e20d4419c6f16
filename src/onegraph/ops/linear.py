"""`onegraph::linear`: a linear layer, as one op for every number of tokens. The reference.

Plain PyTorch has a linear too; this one is where a target chooses, inside of the op and for each call, what is fastest
for the number of tokens, so that one graph and one artifact serve all of them.

Letters: T tokens, O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from onegraph.ops.library import define, define_out

SCHEMA = "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor"


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias`: x [..., I], weight [O, I], bias [O], all of one dtype; gives [..., O], contiguous."""
    return functional.linear(x, weight, bias).contiguous()


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


define(SCHEMA, linear, _fake, torch.Tag.flexible_layout)
define_out(SCHEMA)
