"""Chooses the next token of every sequence in a batch, in batched tensors.

Takes: logits [S, V] and the sequences that they belong to. Gives: a token for each, and log-probabilities
where asked.
Keeps: what depends only on who is in the batch, as long as the same sequences come again.
A row's result depends on that row and its own random stream alone: operations are row by row, ties are kept
or broken by token id, and a sequence draws one number for each of its sampled tokens. What nobody in the
batch asks for is skipped. `S` rows, `V` vocabulary, `Q` rows that are drawn.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from onegraph.engine.logprobs import RankedToken, rank_tokens
from onegraph.engine.penalties import Penalties
from onegraph.engine.random_draw import draw_by_weight
from onegraph.engine.request import Sequence
from onegraph.engine.token_filters import keep_likeliest


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the sampler chose, one entry a row.

    token_ids: the tokens. ranked: log-probabilities of the likeliest tokens and of the chosen one, by the
    model alone; None where not asked for. broken: rows without a finite largest logit; their tokens mean
    nothing.
    """

    token_ids: list[int]
    ranked: list[list[RankedToken] | None]
    broken: frozenset[int]


class Sampler:
    """Samples for batches; logits may be of any float dtype, arithmetic is fp32."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids
        self._members: list[Sequence] = []
        self._asked = _Asked.by([], 0, torch.device("cpu"))

    def __call__(self, logits: Tensor, sequences: Seq[Sequence]) -> Sampled:
        """Samples one token a row; sequences[i] is the owner of row i."""
        members, vocab_size = list(sequences), logits.shape[1]
        if self._members != members or self._asked.vocab_size != vocab_size:
            self._members = members
            self._asked = _Asked.by(members, vocab_size, logits.device)
        processed = self._process(logits)
        best, token_ids = torch.ops.onegraph.largest(processed)  # NaN, if there is one
        if self._asked.drawn:
            token_ids[self._asked.drawn_rows] = self._draw(processed)
        ranked: list[list[RankedToken] | None] = [None] * len(members)
        if self._asked.logprob_rows:
            rows = self._asked.logprob_rows
            found = rank_tokens(logits[rows], token_ids[rows], self._asked.num_logprobs)
            for row, one in zip(rows, found, strict=True):
                ranked[row] = one
        chosen, finite = torch.stack((token_ids, best.isfinite().to(token_ids.dtype))).tolist()  # waits once
        return Sampled(chosen, ranked, frozenset(row for row, is_finite in enumerate(finite) if not is_finite))

    def _process(self, logits: Tensor) -> Tensor:
        """min_tokens, logit_bias, and the penalties, in this order, in a copy in fp32; without them the logits."""
        asked = self._asked
        if not asked.min_tokens and asked.bias is None and asked.penalties is None:
            return logits
        logits = logits.to(torch.float32, copy=True)
        masked = [
            (row, token)
            for row in asked.min_tokens
            if self._members[row].num_output_tokens < self._members[row].params.min_tokens
            for token in self._stop_ids(self._members[row])
            if token < logits.shape[1]
        ]
        if masked:
            rows, tokens = torch.tensor(masked, device=logits.device).T
            logits[rows, tokens] = -torch.inf
        if asked.bias is not None:
            rows, tokens, values = asked.bias
            logits[rows, tokens] += values
        if asked.penalties is not None:
            asked.penalties.apply_(logits)
        return logits

    def _stop_ids(self, sequence: Sequence) -> list[int]:
        eos = [] if sequence.params.ignore_eos else self._eos_token_ids
        return [*eos, *sequence.params.stop_ids]

    def _draw(self, logits: Tensor) -> Tensor:
        """Draws from the rows that are not greedy, int64 [Q]."""
        asked = self._asked
        rows = (logits if len(asked.drawn) == len(logits) else logits[asked.drawn_rows]).float()
        scaled = (rows - rows.amax(-1, keepdim=True)).div_(asked.temperature)
        kept = keep_likeliest(scaled, min_p=asked.min_p, top_k=asked.top_k, top_p=asked.top_p)
        uniform = torch.tensor([self._members[row].stream.random() for row in asked.drawn], dtype=torch.float64)
        uniform = uniform.to(logits.device)
        return draw_by_weight(kept.exp_(), uniform)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the members of a batch ask for; None or empty where nobody does."""

    vocab_size: int
    drawn: list[int]  # rows that are not greedy
    drawn_rows: Tensor
    temperature: Tensor  # [Q, 1]
    min_p: Tensor | None  # [Q, 1]
    top_k: Tensor | None  # [Q, 1]; V where off
    top_p: Tensor | None  # [Q, 1]
    min_tokens: list[int]  # rows
    bias: tuple[Tensor, Tensor, Tensor] | None  # rows, token ids, values, all [number of biases]
    penalties: Penalties | None
    logprob_rows: list[int]
    num_logprobs: list[int]

    @staticmethod
    def by(members: list[Sequence], vocab_size: int, device: torch.device) -> "_Asked":
        """For logits on the device, where all tensors here lie too."""
        params = [m.params for m in members]
        drawn = [row for row, p in enumerate(params) if not p.greedy]
        drawn_params = [params[row] for row in drawn]
        bias = [(row, token, b) for row, p in enumerate(params) for token, b in p.bias.items()]
        penalised = [row for row, p in enumerate(params) if p.penalised]
        logprob_rows = [row for row, p in enumerate(params) if p.logprobs is not None]
        top_k = [p.top_k if p.top_k > 0 else vocab_size for p in drawn_params]
        return _Asked(
            vocab_size=vocab_size,
            drawn=drawn,
            drawn_rows=torch.tensor(drawn, dtype=torch.int64, device=device),
            temperature=_column([p.temperature for p in drawn_params], device),
            min_p=_column([p.min_p for p in drawn_params], device) if any(p.min_p for p in drawn_params) else None,
            top_k=torch.tensor(top_k, device=device)[:, None] if any(k < vocab_size for k in top_k) else None,
            top_p=_column([p.top_p for p in drawn_params], device) if any(p.top_p < 1 for p in drawn_params) else None,
            min_tokens=[row for row, p in enumerate(params) if p.min_tokens],
            bias=(
                torch.tensor([row for row, _, _ in bias], device=device),
                torch.tensor([token for _, token, _ in bias], device=device),
                torch.tensor([value for _, _, value in bias], device=device),
            )
            if bias
            else None,
            penalties=Penalties([members[row] for row in penalised], penalised, device) if penalised else None,
            logprob_rows=logprob_rows,
            num_logprobs=[params[row].logprobs or 0 for row in logprob_rows],
        )


def _column(values: Seq[float], device: torch.device) -> Tensor:
    """fp32 [n, 1]."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]
