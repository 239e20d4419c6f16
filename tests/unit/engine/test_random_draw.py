"""A draw is the inverse of the cumulative distribution, whatever the vocabulary's size and the weights' zeros."""

import pytest
import torch

from onegraph.engine.random_draw import draw_by_weight


@pytest.mark.parametrize("vocab_size", [1, 5, 255, 256, 257, 1000, 49152])
@pytest.mark.parametrize("share", [1.0, 0.02], ids=["all weighty", "mostly 0"])
def test_the_drawn_token_is_where_the_cumulated_weight_passes_the_number(vocab_size: int, share: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    weights = torch.rand(40, vocab_size, generator=generator).exp()
    weights *= torch.rand(40, vocab_size, generator=generator) < share
    weights[:, vocab_size // 2] = 1.0
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    tokens = draw_by_weight(weights, uniform)
    rows = torch.arange(40)
    assert (weights[rows, tokens] > 0).all()
    ends = weights.double().cumsum(1)
    at = uniform * ends[:, -1]
    slack = 1e-9 * ends[:, -1]
    assert (ends[rows, tokens] + slack > at).all()
    assert (ends[rows, tokens] - weights[rows, tokens] - slack <= at).all()


def test_a_row_s_draw_is_its_own() -> None:
    weights = torch.rand(8, 700, generator=torch.Generator().manual_seed(3))
    uniform = torch.linspace(0, 0.99, 8, dtype=torch.float64)
    together = draw_by_weight(weights, uniform)
    assert together.tolist() == [int(draw_by_weight(weights[i : i + 1], uniform[i : i + 1])) for i in range(8)]


def test_draws_follow_the_weights() -> None:
    weights = torch.tensor([[1.0, 0.0, 3.0]]).expand(4000, 3).contiguous()
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    assert draw_by_weight(weights, uniform).bincount(minlength=3).tolist() == [1000, 0, 3000]
