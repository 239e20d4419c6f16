"""Draws one token a row from weights: the inverse of the cumulative distribution at one uniform number.

Takes: weights [Q, V] that need not sum to 1, and uniform numbers [Q]. Gives: tokens [Q]. The weights are summed in
fp64 by chunks, and only the chunk that the number falls into is cumulated, so that a draw reads the weights once.
`C` chunks of `W` tokens.
"""

import torch
from torch import Tensor

_CHUNK = 256


def draw_by_weight(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token of each row whose cumulated weight is above `uniform` of the total, int64 [Q].

    weights: fp32 [Q, V], at least one of each row above 0; uniform: fp64 [Q] in [0, 1). Never a token of weight 0.
    """
    vocab_size = weights.shape[1]
    num_whole = vocab_size // _CHUNK * _CHUNK
    sums = weights[:, :num_whole].unflatten(1, (-1, _CHUNK)).sum(-1, dtype=torch.float64)
    if num_whole < vocab_size:
        sums = torch.cat((sums, weights[:, num_whole:].sum(-1, keepdim=True, dtype=torch.float64)), dim=1)
    ends = sums.cumsum(-1)  # [Q, C]
    total = ends[:, -1:]
    at = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))  # [Q, 1]
    chunk = torch.searchsorted(ends, at, right=True).clamp_(max=ends.shape[1] - 1)
    before = ends.gather(1, chunk) - sums.gather(1, chunk)
    places = torch.arange(_CHUNK, device=weights.device)
    tokens = chunk * _CHUNK + places  # [Q, W]
    inside = weights.gather(1, tokens.clamp(max=vocab_size - 1)).masked_fill_(tokens >= vocab_size, 0)
    within = torch.searchsorted(inside.cumsum(-1, dtype=torch.float64), at - before, right=True)
    # Where rounding puts the number behind the chunk's end, its last token with weight is meant; the same in front.
    weighty = places * (inside > 0)
    last = weighty.amax(-1, keepdim=True)
    first = (inside > 0).to(torch.int8).argmax(-1, keepdim=True)
    return tokens.gather(1, within.clamp(first, last))[:, 0]
