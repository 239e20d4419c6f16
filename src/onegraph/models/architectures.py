"""Which architectures are served: those proven, and others whose every attention layer is understood.

Takes a transformers config; runs the model's own code once without weights, with an attention that notes what
each layer asks for. Gives the layout of the KV cache, or a ModelError that names what isn't supported.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from onegraph.errors import ModelError, OnegraphError
from onegraph.log import get_logger
from onegraph.models.attention import PROBE, register

log = get_logger(__name__)

PROVEN = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "mixtral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "opt",
    "olmo2",
    "glm4",
)
"""The `model_type`s whose tokens are compared with transformers' own in the tests."""

EXPERTS = "batched_mm"
"""The implementation of mixture-of-experts layers that traces as one graph for every number of tokens."""


@dataclass(frozen=True)
class AttentionLayout:
    """What all attention layers have in common."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def check_architecture(config: Any, trust_remote_code: bool) -> AttentionLayout:
    """Raises ModelError, before any weights are read, for an architecture that can't be served."""
    kind = getattr(config, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported(kind, "it is an encoder-decoder")
    if getattr(config, "reorder_and_upcast_attn", False):
        raise _unsupported(kind, "its attention (reorder_and_upcast_attn) doesn't go through transformers' interface")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (trust_remote_code and hasattr(config, "auto_map")):
        raise _unsupported(kind, "transformers has no causal language model class for it")
    seen = _probe(config, kind, trust_remote_code)
    layers = config.get_text_config().num_hidden_layers
    if sorted(entry["layer_idx"] for entry in seen) != list(range(layers)):
        raise _unsupported(
            kind,
            f"{len(seen)} of its {layers} layers use attention that goes through transformers' interface once each; "
            "state-space and mixed layers aren't supported",
        )
    layouts = {(entry["num_kv_heads"], entry["head_dim"]) for entry in seen}
    if len(layouts) != 1:
        raise _unsupported(kind, f"its layers have different key-value heads: {sorted(layouts)}")
    if kind not in PROVEN:
        log.warning("%s isn't among the architectures that are tested; every attention layer of it is understood", kind)
    heads, size = layouts.pop()
    return AttentionLayout(layers, heads, size)


def _probe(config: Any, kind: str, trust_remote_code: bool) -> list[dict[str, Any]]:
    """One call on the meta device with two tokens: no weights, no arithmetic, the model's own Python."""
    register()
    seen: list[dict[str, Any]] = []
    config = copy.deepcopy(config)
    config.pad_token_id = None  # with one, transformers looks for it in the ids, which meta tensors don't have
    ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    try:
        with torch.device("meta"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=PROBE,
                trust_remote_code=trust_remote_code,
                **experts_argument(config),
            ).eval()
            model(
                input_ids=ids,
                position_ids=ids,
                use_cache=False,
                logits_to_keep=torch.zeros(1, dtype=torch.int64, device="meta"),
                onegraph_seen=seen,
            )
    except OnegraphError as error:
        raise _unsupported(kind, error.message, error.where) from error
    except Exception as error:
        raise _unsupported(kind, f"its code failed on a flat batch: {type(error).__name__}: {error!s:.200}") from error
    return seen


def experts_argument(config: Any) -> dict[str, Any]:
    """The keyword that chooses the implementation of experts, for configs that have experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return {"experts_implementation": EXPERTS} if any(getattr(config, name, None) for name in names) else {}


def _unsupported(kind: str, reason: str, where: str | None = None) -> ModelError:
    return ModelError(
        f"the architecture {kind!r} isn't supported: {reason}",
        where=where or "the model's config.json",
        hint=f"supported and tested: {', '.join(PROVEN)}",
    )
