"""Memory of tensors: who shares it, clones that share it alike, and equality of bits."""

from __future__ import annotations

import numpy as np
import torch

from onegraph.ops.memory import clone_together, same_bytes, share_memory


def test_sharing_is_told_by_addresses() -> None:
    x = torch.arange(8.0)
    assert share_memory(x, x[6:]) and share_memory(x[:1], x.view(torch.int32)[6:])
    assert share_memory(x, torch.from_numpy(x.numpy()[2:]))
    assert not share_memory(x, x.clone()) and not share_memory(torch.empty(0), torch.empty(0))


def test_clones_share_as_their_originals_do() -> None:
    base = torch.arange(1000.0)
    tensors = [base[200:208].view(2, 4).t(), base[204:207], base.view(torch.int32)[205:206], torch.ones(3), base[:0]]
    clones = clone_together(tensors)
    for tensor, clone in zip(tensors, clones, strict=True):
        assert same_bytes(tensor, clone) and (tensor.stride(), tensor.dtype) == (clone.stride(), clone.dtype)
        assert not share_memory(tensor, clone)
    clones[1].fill_(-1)
    assert clones[0].t().flatten()[4:7].tolist() == [-1] * 3 and clones[2].view(torch.float32).item() == -1
    assert base[204] == 204
    assert clones[0].untyped_storage().nbytes() < 200, "only what is spanned is copied"


def test_other_layouts_are_cloned_one_by_one() -> None:
    tensors = [torch.eye(3).to_sparse(), torch.tensor([1 + 2j]).conj(), torch.tensor(np.float64(3))]
    for tensor, clone in zip(tensors, clone_together(tensors), strict=True):
        assert torch.equal(tensor.to_dense(), clone.to_dense()) and clone.layout == tensor.layout


def test_bits_decide_equality() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert same_bytes(nan, nan.clone()) and not same_bytes(zero, -zero)
    x = torch.arange(6.0).view(2, 3)
    assert same_bytes(x.t(), x.t().contiguous()) and not same_bytes(x, x + 1)
