"""canonicalise_norms: every spelling of an RMSNorm becomes one; what isn't one stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from onegraph.passes.canonicalise_norms import CanonicaliseNorms
from onegraph.passes.remove_dead_code import RemoveDeadCode
from tests.unit.passes.one_piece import calls, piece_of, rewritten

EPS = 1e-5


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def inverse(v: torch.Tensor) -> torch.Tensor:
    return 1 / torch.sqrt(v)


SPELLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pow, rsqrt": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "product": lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS),
    "square": lambda x: x * torch.rsqrt(torch.square(x).mean(-1, keepdim=True) + EPS),
    "1 / sqrt": lambda x: x * inverse(x.pow(2).mean(-1, keepdim=True) + EPS),
    "quotient": lambda x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "reciprocal": lambda x: x * (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt().reciprocal(),
    "power": lambda x: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -0.5),
    "rms_norm": lambda x: F.rms_norm(x, (8,), eps=EPS),
}


def text(piece: Any) -> list[str]:
    """The calls with the names of what they give left out."""
    names: dict[str, str] = {}
    lines = []
    for call in calls(piece):
        name, separator, rest = call.partition(" = ")
        shown = rest if separator else name
        for old, new in sorted(names.items(), key=lambda pair: -len(pair[0])):
            shown = shown.replace(old, new)
        if separator:
            names[name] = f"%{len(names)}"
        lines.append(shown)
    return lines


@pytest.mark.parametrize("name", SPELLINGS)
def test_all_spellings_become_one(name: str) -> None:
    given = piece_of(SPELLINGS[name], x(), unbacked=False)
    after, runs = rewritten(given, CanonicaliseNorms(), RemoveDeadCode())
    wanted, _ = rewritten(piece_of(SPELLINGS["pow, rsqrt"], x(), unbacked=False), RemoveDeadCode())
    assert text(after) == text(wanted)
    assert (runs[0].rewrites > 0) == (name != "pow, rsqrt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_with_a_weight_rounds_as_torch_does(dtype: torch.dtype) -> None:
    weight = torch.linspace(0.5, 1.5, 8).to(dtype)
    given = piece_of(lambda x, w: F.rms_norm(x, (8,), w, EPS), x(dtype), weight, unbacked=False)
    after, _ = rewritten(given, CanonicaliseNorms())  # with check_passes
    assert not any("rms_norm" in call for call in calls(after))
    found = after.graph_module(*_inputs(after, x(dtype), weight))[0]
    torch.testing.assert_close(found, F.rms_norm(x(dtype), (8,), weight, EPS))


def _inputs(piece: Any, *given: torch.Tensor) -> list[torch.Tensor]:
    by_shape = {tuple(one.shape): one for one in given}
    return [by_shape[tuple(map(int, value.shape))] for value in piece.fake_inputs]


@pytest.mark.parametrize("residual_first", [True, False])
def test_the_residual_stands_first(residual_first: bool) -> None:
    def function(residual: torch.Tensor, x: torch.Tensor) -> Any:
        y = x.sin()
        h = residual + y if residual_first else y + residual
        return h, h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)

    after, (run,) = rewritten(piece_of(function, x(), x() + 1, unbacked=False), CanonicaliseNorms())
    assert "h = add(l_residual_, y)" in calls(after)
    assert run.rewrites == (0 if residual_first else 1)


TRAPS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a layer norm": lambda x: F.layer_norm(x, (8,)),
    "over another dim": lambda x: x / torch.sqrt(x.pow(2).mean(0, keepdim=True) + EPS),
    "without keepdim": lambda x: x.pow(2).mean(-1) + EPS,
    "no mean of squares": lambda x: x / torch.sqrt(x.pow(3).mean(-1, keepdim=True) + EPS),
    "a product of two": lambda x: x / torch.sqrt((x * x.sin()).mean(-1, keepdim=True) + EPS),
    "another root": lambda x: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -0.25),
    "the root itself": lambda x: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS),
    "a root divided": lambda x: torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) / x,
    "over two dims": lambda x: F.rms_norm(x, (6, 8), eps=EPS),
    "eps by torch": lambda x: F.rms_norm(x, (8,)),
}


@pytest.mark.parametrize("name", TRAPS)
def test_what_is_no_such_norm_stays(name: str) -> None:
    given = piece_of(TRAPS[name], x(), unbacked=False)
    after, (run,) = rewritten(given, CanonicaliseNorms())
    assert calls(after) == calls(given)
    assert run.rewrites == 0
    assert bool(run.near_misses) == (name in ("over two dims", "eps by torch"))


def test_fuel_is_asked_for() -> None:
    given = piece_of(SPELLINGS["rms_norm"], x(), unbacked=False)
    after, (run,) = rewritten(given, CanonicaliseNorms(), fuel=0)
    assert calls(after) == calls(given)
    assert run.rewrites == 0


def changes_v(x: torch.Tensor) -> torch.Tensor:
    v = x.pow(2).mean(-1, keepdim=True) + EPS
    root = torch.sqrt(v)
    v.add_(100)
    return x / root


def changes_root(x: torch.Tensor) -> torch.Tensor:
    root = torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    root.add_(1)
    return x / root


@pytest.mark.parametrize("function", [changes_v, changes_root], ids=lambda one: one.__name__)
def test_what_is_changed_in_place_stays(function: Callable[..., Any]) -> None:
    _, (run,) = rewritten(piece_of(function, x(), unbacked=False), CanonicaliseNorms())
    assert run.rewrites == 0


def test_sizes_as_operands() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        h = x + x.shape[0]
        return x.shape[0] / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + EPS)

    _, (run,) = rewritten(piece_of(function, x()), CanonicaliseNorms())
    assert run.rewrites == 0


def test_a_residual_of_other_strides_keeps_its_place() -> None:
    def function(residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h = x.sin() + residual.t()
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)

    given = piece_of(function, torch.randn(8, 6), x(), unbacked=False)
    _, (run,) = rewritten(given, CanonicaliseNorms())
    assert run.rewrites == 0
