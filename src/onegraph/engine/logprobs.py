"""Log-probabilities of tokens, batched.

Takes: logits [S, V] and a token for each row. Gives: for each row the token's log-probability and rank, and
those of the likeliest tokens, as plain numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256  # bounds the fp32 copy of [rows, V] when a long prompt's rows are all asked for


@dataclass(frozen=True, slots=True)
class RankedToken:
    """A token with its natural-log probability and its rank (1 is the likeliest)."""

    token_id: int
    logprob: float
    rank: int


def rank_tokens(logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> list[list[RankedToken]]:
    """For row i the num_top[i] likeliest tokens, best first, and then token_ids[i] if not among them.

    logits: [S, V], any float dtype, read in fp32; token_ids: int64 [S]. A token's rank counts the tokens that
    are more likely, so equal ones share a rank, except among the likeliest, which are numbered as listed.
    """
    return [
        ranked
        for start in range(0, len(num_top), _ROWS_AT_ONCE)
        for ranked in _rank_rows(
            logits[start : start + _ROWS_AT_ONCE],
            token_ids[start : start + _ROWS_AT_ONCE],
            num_top[start : start + _ROWS_AT_ONCE],
        )
    ]


def _rank_rows(logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> list[list[RankedToken]]:
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(-1, token_ids[:, None])
    own_rank = ((logprobs > own).sum(-1) + 1).tolist()
    most = max(num_top)
    top = logprobs.topk(most, dim=-1) if most else None
    top_values = top.values.tolist() if top else [[]] * len(num_top)
    top_ids = top.indices.tolist() if top else [[]] * len(num_top)
    rows = []
    for row, (token_id, value, rank, k) in enumerate(
        zip(token_ids.tolist(), own[:, 0].tolist(), own_rank, num_top, strict=True)
    ):
        pairs = zip(top_ids[row][:k], top_values[row][:k], strict=True)
        ranked = [RankedToken(i, v, at) for at, (i, v) in enumerate(pairs, start=1)]
        if token_id not in top_ids[row][:k]:
            ranked.append(RankedToken(token_id, value, rank))
        rows.append(ranked)
    return rows
