"""What operators reads off torch's schemas, and the writes that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onegraph.torch_compat import operators

ATEN = torch.ops.aten


def test_a_packet_s_overload_is_the_one_that_runs() -> None:
    x = torch.ones(2)
    assert operators.overload_for(ATEN.add, (x, x), {}) is ATEN.add.Tensor
    assert operators.overload_for(ATEN.add, (x, 1), {"alpha": 2}).name() in ("aten::add.Scalar", "aten::add.Tensor")
    assert operators.overload_for(ATEN.add.out, (), {}) is ATEN.add.out


def test_schemas_tell_names_writes_and_views() -> None:
    assert operators.named_arguments(ATEN.add.out, (1, 2), {"out": 3}) == {"self": 1, "other": 2, "out": 3}
    assert operators.written_arguments(ATEN.add_.Tensor) == {"self"}
    assert operators.written_arguments(ATEN._foreach_add_.Scalar) == {"self"}
    assert operators.written_arguments(ATEN.add.Tensor) == frozenset()
    assert operators.may_share(ATEN.view.default, 0, "self") and operators.may_share(ATEN.add_.Tensor, 0, "self")
    assert operators.may_share(ATEN.split.Tensor, 0, "self")
    assert not operators.may_share(ATEN.add.Tensor, 0, "self") and not operators.may_share(ATEN.add_.Tensor, 0, "other")


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: x[1:].view(-1).sub_(2),
        lambda x: torch.add(torch.ones(4), 1, out=x),
        lambda x: torch._foreach_add_([torch.ones(1), x], 1),
        lambda x: x.__setitem__(0, 5),
        lambda x: torch.nn.functional.batch_norm(torch.rand(3, 4), x, torch.ones(4), training=True),
    ],
)
def test_a_write_is_refused_before_it_happens(write: Any) -> None:
    kept, free = torch.zeros(4), torch.zeros(4)
    with operators.refuse_writes([kept]):
        write(free)
        with pytest.raises(operators.WriteRefusedError) as refused:
            write(kept)
    assert torch.equal(kept, torch.zeros(4)) and not torch.equal(free, kept)
    assert refused.value.tensor.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()
