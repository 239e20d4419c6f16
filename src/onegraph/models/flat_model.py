"""FlatModel: a transformers model called on a flat batch, the tokens of many requests one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim

MAX_KV_BLOCKS = 2**31 - 1
"""Block tables are int32."""


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
    def dynamic_shapes(max_num_tokens: int, max_num_seqs: int, max_blocks: int, num_layers: int) -> dict[str, Any]:
        """The sizes that change between steps, for `onegraph.compile`, and the KV cache's blocks.

        Those follow the memory that a process finds free: compiled in, they would make each start a cold one; there
        are two or more, since torch takes a size of 1 for another graph. A Dim has at least two sizes, so a limit of
        one is declared as two; the engine keeps to its limits.
        """

        def dim(name: str, most: int, least: int = 1) -> Any:
            return Dim(name, min=least, max=max(least + 1, most))

        num_tokens = dim("num_tokens", max_num_tokens)
        num_reqs = dim("num_reqs", max_num_seqs)
        kv_cache = {0: dim("num_kv_blocks", MAX_KV_BLOCKS, least=2)}
        return {
            "input_ids": {0: num_tokens},
            "positions": {0: num_tokens},
            "slot_mapping": {0: num_tokens},
            "query_start_loc": {0: dim("num_starts", max_num_seqs + 1, least=2)},
            "seq_lens": {0: num_reqs},
            "block_tables": {0: num_reqs, 1: dim("num_blocks_per_req", max_blocks)},
            "logits_indices": {0: dim("num_logits", max(max_num_tokens, max_num_seqs))},
            "kv_caches": [(kv_cache, kv_cache)] * num_layers,
        }
