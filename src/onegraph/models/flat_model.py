"""FlatModel: a transformers model called on a flat batch, the tokens of many requests one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim


class FlatModel(torch.nn.Module):
    """Wraps a transformers causal language model that was loaded with our attention."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        *,
        slot_mapping: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        block_tables: torch.Tensor,
        logits_indices: torch.Tensor,
        kv_caches: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """Logits [S, V] of the rows `logits_indices` [S], in the model's dtype; the KV caches are written.

        input_ids, positions, slot_mapping int64 [T]; query_start_loc int32 [R + 1]; seq_lens int32 [R];
        block_tables int32 [R, M]; kv_caches one pair [N, B, K, D] for each layer.
        """
        output = self.model(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=logits_indices,
            slot_mapping=slot_mapping,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            block_tables=block_tables,
            kv_caches=kv_caches,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    @staticmethod
    def dynamic_shapes(max_num_tokens: int, max_num_seqs: int, max_blocks: int) -> dict[str, Any]:
        """The sizes that change between steps, for `onegraph.compile`."""
        num_tokens = Dim("num_tokens", min=1, max=max_num_tokens)
        num_reqs = Dim("num_reqs", min=1, max=max_num_seqs)
        return {
            "input_ids": {0: num_tokens},
            "positions": {0: num_tokens},
            "slot_mapping": {0: num_tokens},
            "query_start_loc": {0: Dim("num_starts", min=2, max=max_num_seqs + 1)},
            "seq_lens": {0: num_reqs},
            "block_tables": {0: num_reqs, 1: Dim("num_blocks_per_req", min=1, max=max_blocks)},
            "logits_indices": {0: Dim("num_logits", min=1, max=max(max_num_tokens, max_num_seqs))},
        }
