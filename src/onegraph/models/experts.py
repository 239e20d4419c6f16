"""Mixture-of-experts layers as one graph for every number of tokens, in transformers' interface for experts.

transformers' own choices don't do: `eager` loops over the experts that were hit (its graph depends on the data),
`batched_mm` copies an expert's weights to every row (100 GB for 2048 tokens of a 30B model), and `grouped_mm` has
no fp64, which the reference for numerics needs.

Letters: T tokens, C experts chosen by each, S = T * C, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import onegraph.ops  # noqa: F401 - registers the ops
from onegraph.errors import ModelError

EXPERTS = "onegraph_experts"


def experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """One layer's experts: hidden_states [T, H], top_k_index and top_k_weights [T, C]; returns [T, H].

    `module` is an experts class of transformers: its weights [experts, out, in] (or transposed), and what it says
    of gates, biases and norms. Raises ModelError for experts that are spread over devices.
    """
    if getattr(module, "_is_expert_parallel", False):  # transformers 5.17 doesn't say
        raise ModelError("experts spread over devices aren't supported", where=type(module).__name__)
    num_tokens, chosen = top_k_index.shape
    expert_ids = top_k_index.reshape(-1)
    x = hidden_states.repeat_interleave(chosen, dim=0)
    x = _linear(module, "gate_up_proj" if module.has_gate else "up_proj", x, expert_ids)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _linear(module, "down_proj", x, expert_ids)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1, 1)
    return x.view(num_tokens, chosen, -1).sum(dim=1).to(hidden_states.dtype)


def _linear(module: Any, name: str, x: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)
    if module.is_transposed:
        weight = weight.transpose(1, 2)
    out: torch.Tensor = torch.ops.onegraph.grouped_linear(x.to(weight.dtype), weight, expert_ids)
    return out + getattr(module, f"{name}_bias")[expert_ids] if module.has_bias else out


def register_experts() -> None:
    """Puts `experts` into transformers' interface; doing it again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts)


def experts_argument(config: Any) -> dict[str, Any]:
    """The keyword that chooses the implementation of experts, for configs that have experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return {"experts_implementation": EXPERTS} if any(getattr(config, name, None) for name in names) else {}
