"""Rotary embeddings whose frequencies follow the longest position of a call are fixed, for as far as that is exact.

With `longrope` and `dynamic` scaling transformers changes the frequencies of all tokens once one position of the
call lies beyond the original length. In a flat batch a request would then change its batch-mates' results.
Below that length the frequencies are constant: there they stay, and contexts end there.
"""

from __future__ import annotations

from typing import Any

import torch

FIXED = "default"


def fix_frequencies(model: torch.nn.Module) -> int | None:
    """Makes the frequencies of a model's rotary embeddings constant, in place.

    Returns the length below which they are what transformers computes; None where they were constant anyway.
    """
    limits = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and _varies(kinds):
            limits.append(_original_length(module, module.config.rope_parameters, kinds))  # type: ignore[union-attr]
            module.rope_type = FIXED  # type: ignore[assignment]
        elif isinstance(kinds, dict) and any(_varies(kind) for kind in kinds.values()):
            for layer_type, kind in kinds.items():
                if _varies(kind):
                    parameters = module.config.rope_parameters[layer_type]  # type: ignore[index,union-attr]
                    limits.append(_original_length(module, parameters, kind))
            module.rope_type = {name: FIXED if _varies(kind) else kind for name, kind in kinds.items()}  # type: ignore[assignment]
    return min(limits, default=None)


def _varies(kind: str) -> bool:
    """As transformers' `dynamic_rope_update` tells them apart."""
    return "dynamic" in kind or kind == "longrope"


def _original_length(module: Any, parameters: Any, kind: str) -> int:
    if kind == "longrope":
        return int(parameters["original_max_position_embeddings"])
    return int(module.original_max_seq_len)
