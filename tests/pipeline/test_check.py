"""compiled.check: the compiled model against eager and fp64 at chosen sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

import onegraph
from onegraph.errors import ConfigError
from onegraph.ir.dims import DynamicDim
from onegraph.ir.ledger import ShapeEntry
from onegraph.size_check import sizes_to_check

NUM_TOKENS = Dim("num_tokens", min=1, max=256)


def dim(least: int = 1, most: int = 256) -> DynamicDim:
    return DynamicDim("num_tokens", least, most, ("x[0]",))


def test_sizes_are_the_ends_the_neighbours_of_constraints_and_powers_of_two() -> None:
    entry = ShapeEntry("num_tokens != 100", "capture", "proven")
    other = ShapeEntry("others > 77", "capture", "proven")
    assert sizes_to_check(dim(), (entry, other), 0) == (1, 2, 99, 100, 101, 256)
    assert len(sizes_to_check(dim(), (), 10)) == 10
    assert set(sizes_to_check(dim(), (), 1000)) >= {3, 4, 5, 31, 32, 33, 127, 128, 129, 255, 256}
    assert sizes_to_check(dim(2, 5), (), 100) == (2, 3, 4, 5)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_sound_model_is_in_order_at_every_size(backend: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32)).eval()
    compiled = onegraph.compile(
        module, dynamic_shapes={"input": {0: NUM_TOKENS}}, config={"backend": backend}, name="tower"
    )
    checks = compiled.check({"input": torch.randn(5, 32)}, num_sizes=8)
    assert [check.num_tokens for check in checks][:2] == [1, 2] and checks[-1].num_tokens == 256
    assert len(checks) == 8 and all(check.ok for check in checks)
    told = compiled.explain().to_dict()["check"]
    assert [set(check) for check in told] == [{"num_tokens", "max_error", "eager_error", "ok"}] * 8
    assert "8 of 8 sizes in order" in str(compiled.explain())


def test_a_wrong_compile_is_told_with_its_sizes_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from onegraph.compilers import eager

    original = eager.compile_piece

    def wrong(piece: object) -> object:
        call = original(piece)  # type: ignore[arg-type]

        def run(*inputs: object) -> object:
            (out,) = call(*inputs)
            return (out * (1.01 if out.shape[0] > 100 else 1.0),)

        return run

    monkeypatch.setattr(eager, "compile_piece", wrong)
    compiled = onegraph.compile(nn.Linear(8, 8), dynamic_shapes={"input": {0: NUM_TOKENS}}, config={"backend": "eager"})
    checks = compiled.check(torch.randn(3, 8), num_sizes=12)
    assert all(check.ok == (check.num_tokens <= 100) for check in checks)
    assert "wrong at 256" in str(compiled.explain())


def test_a_check_needs_a_compiled_model_and_rows() -> None:
    uncompiled = onegraph.compile(nn.Linear(8, 8), config=0)
    with pytest.raises(ConfigError, match="nothing is compiled"):
        uncompiled.check(torch.ones(2, 8))
    compiled = onegraph.compile(
        nn.Linear(8, 8),
        dynamic_shapes={"input": {0: Dim("num_tokens", min=0, max=16)}},
        config={"backend": "eager"},
    )
    with pytest.raises(ConfigError, match="no rows"):
        compiled.check(torch.ones(0, 8))


def test_a_model_without_dynamic_dims_is_checked_as_it_is() -> None:
    compiled = onegraph.compile(nn.Linear(8, 8), config={"backend": "eager"})
    assert [check.ok for check in compiled.check(torch.ones(2, 8))] == [True]
