"""min_p, top_k and top_p over rows of logits.

Takes: logits [Q, V], already divided by the temperature, and settings [Q, 1]. Gives: logits with -inf for the
tokens that may not be drawn. Tokens whose logits equal the last kept one are kept too, so that the result
depends on values alone, never on the order in which a sort leaves equal ones. The likeliest token is kept.
"""

import torch
from torch import Tensor

_FIRST_SORTED = 512  # the tokens that top_p keeps are nearly always among so many; a sort of all is 10x slower


def keep_likeliest(logits: Tensor, *, min_p: Tensor | None, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """min_p, then top_k, then top_p over what is left; None is off. `top_k` is int64, V where off."""
    if min_p is not None:
        # p >= min_p * p_max, in logits
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + min_p.log(), -torch.inf)
    if top_p is not None:
        least = _least_kept_by_top_p(logits, top_k, top_p)
    elif top_k is not None:
        least = _sorted(logits, min(int(top_k.max()), logits.shape[1])).gather(-1, top_k - 1)
    else:
        return logits
    return logits.masked_fill(logits < least, -torch.inf)


def _least_kept_by_top_p(logits: Tensor, top_k: Tensor | None, top_p: Tensor) -> Tensor:
    """The smallest logit, [Q, 1], that top_k and then top_p keep in each row."""
    vocab_size = logits.shape[1]
    if top_k is None:
        top_k = torch.full_like(top_p, vocab_size, dtype=torch.int64)
    # Rows without a top_k are tried with the first few.
    num_sorted = min(int(top_k.where(top_k < vocab_size, _FIRST_SORTED).max()), vocab_size)
    best = _sorted(logits, num_sorted)
    least, complete = _cut_by_top_p(best, logits, top_k, top_p)
    if num_sorted < vocab_size and not complete.all():
        rows = (~complete).nonzero()[:, 0]  # flat distributions: sort these whole
        best = _sorted(logits[rows], vocab_size)
        least[rows], _ = _cut_by_top_p(best, logits[rows], top_k[rows], top_p[rows])
    return least


def _cut_by_top_p(best: Tensor, logits: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """From the largest logits, descending: the least kept one [Q, 1], and whether it is surely it [Q]."""
    num_sorted, vocab_size = best.shape[1], logits.shape[1]
    within_k = torch.arange(num_sorted, device=best.device) < top_k
    total = torch.where(
        top_k < vocab_size,
        best.masked_fill(~within_k, -torch.inf).logsumexp(-1, keepdim=True),
        logits.logsumexp(-1, keepdim=True),
    )
    probs = (best - total).exp()
    before = probs.cumsum(-1, dtype=torch.float64) - probs  # probability of the tokens before each
    kept = within_k & (before < top_p)
    kept[:, 0] = True
    least = best.gather(-1, kept.sum(-1, keepdim=True) - 1)
    return least, (top_k[:, 0] <= num_sorted) | ~kept[:, -1]


def _sorted(logits: Tensor, number: int) -> Tensor:
    """The largest logits of each row, descending, [Q, number]."""
    if number < logits.shape[1] // 4:
        return logits.topk(number, dim=-1).values
    return logits.sort(dim=-1, descending=True).values
