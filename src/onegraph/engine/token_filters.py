"""min_p, top_k and top_p over rows of logits.

Takes: logits [Q, V], already divided by the temperature, and settings [Q, 1]. Gives: logits with -inf for the
tokens that may not be drawn. Tokens whose logits equal the last kept one are kept too, so that the result
depends on values alone, never on the order in which a sort leaves equal ones. The likeliest token is always
kept.
"""

import torch
from torch import Tensor


def keep_likeliest(
    logits: Tensor, *, min_p: Tensor | None, top_k: Tensor | None, top_p: Tensor | None
) -> Tensor:
    """min_p, then top_k, then top_p over what is left; None switches one off. `top_k` is int64, at most V."""
    if min_p is not None:
        # p >= min_p * p_max, in logits
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + min_p.log(), -torch.inf)
    if top_k is None and top_p is None:
        return logits
    num_sorted = logits.shape[1] if top_k is None else int(top_k.max())
    best = logits.topk(num_sorted, dim=-1).values  # descending
    num_kept = top_k if top_k is not None else torch.full_like(best[:, :1], num_sorted, dtype=torch.int64)
    if top_p is not None:
        ranks = torch.arange(num_sorted)
        probs = torch.softmax(best.masked_fill(ranks >= num_kept, -torch.inf), dim=-1)
        before = probs.cumsum(-1, dtype=torch.float64) - probs  # probability of the tokens before each
        num_kept = torch.minimum(num_kept, (before < top_p).sum(-1, keepdim=True).clamp_(min=1))
    return logits.masked_fill(logits < best.gather(-1, num_kept - 1), -torch.inf)
