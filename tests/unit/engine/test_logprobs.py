"""Ranked log-probabilities against a sort."""

import torch

from onegraph.engine.logprobs import rank_tokens


def test_more_rows_than_one_round_with_different_numbers_of_likeliest():
    rows, vocab = 600, 11
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    tokens = torch.arange(rows) % vocab
    num_top = [row % 4 for row in range(rows)]
    expected = torch.log_softmax(logits.double(), -1)
    for row, ranked in enumerate(rank_tokens(logits, tokens, num_top)):
        values = [r.logprob for r in ranked[: num_top[row]]]
        torch.testing.assert_close(
            torch.tensor(values, dtype=torch.double),
            expected[row].sort(descending=True).values[: num_top[row]],
            atol=1e-5,
            rtol=0,
        )
        own = next(r for r in ranked if r.token_id == int(tokens[row]))
        assert abs(own.logprob - float(expected[row, tokens[row]])) < 1e-5
        if own is ranked[-1] and len(ranked) > num_top[row]:
            assert own.rank == int((logits[row] > logits[row, tokens[row]]).sum()) + 1
