"""Which architectures are served: those proven, and others of which everything that attention needs is understood.

Takes a transformers config; runs the model's own code once without weights (see `probe.py`). Gives the layout of
the KV cache, or a ModelError that names what isn't supported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from onegraph.errors import ModelError, OnegraphError
from onegraph.log import get_logger
from onegraph.models.attention import PROBE, AttentionCall
from onegraph.models.masks import MaskRequest, first_difference
from onegraph.models.probe import probe

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

DEFAULT_MAX_POSITIONS = 2048
"""For configs that don't say how many positions the model has."""


@dataclass(frozen=True)
class AttentionLayout:
    """What all attention layers have in common."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def max_positions(config: Any) -> int:
    """The longest context that the config speaks of."""
    return int(getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_POSITIONS)


def check_architecture(config: Any, trust_remote_code: bool) -> AttentionLayout:
    """Raises ModelError, before any weights are read, for an architecture that can't be served."""
    kind = getattr(config, "model_type", "?")
    reason = _refused_by_config(config, trust_remote_code)
    if reason is not None:
        raise _unsupported(kind, reason)
    try:
        calls = probe(config, trust_remote_code)
    except OnegraphError as error:
        raise _unsupported(kind, error.message, error.where) from error
    except Exception as error:
        if isinstance(error, KeyError) and PROBE in error.args:
            reason = "its attention doesn't go through transformers' interface"
        elif MaskRequest.__name__ in str(error):
            reason = "it computes with its attention mask, which a flat batch doesn't have"
        else:
            reason = f"its code failed on a flat batch: {type(error).__name__}: {error!s:.200}"
        raise _unsupported(kind, reason) from error
    layout = _common_layout(kind, calls, config.num_hidden_layers)
    for call in calls:
        reason = _refused_by_mask(call, max_positions(config))
        if reason is not None:
            raise _unsupported(kind, reason, call.where)
    if kind not in PROVEN:
        log.warning("%s isn't among the architectures that are tested; every attention layer of it is understood", kind)
    return layout


def _refused_by_config(config: Any, trust_remote_code: bool) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if config.get_text_config() is not config:
        return "it takes more than text (its config has a text config inside)"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized (quantization_config)"
    if getattr(config, "reorder_and_upcast_attn", False):
        return "its attention (reorder_and_upcast_attn) doesn't go through transformers' interface"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (trust_remote_code and hasattr(config, "auto_map")):
        return "transformers has no causal language model class for it"
    return None


def _refused_by_mask(call: AttentionCall, num_positions: int) -> str | None:
    asked = "no window" if call.sliding_window is None else f"a window of {call.sliding_window}"
    try:
        difference = first_difference(call.mask, call.sliding_window, num_positions)
    except Exception as error:  # noqa: BLE001 - the rule is the model's own code
        return f"the rule of its attention mask isn't one of positions alone: {type(error).__name__}: {error!s:.200}"
    return None if difference is None else f"its attention is causal with {asked}, but {difference}"


def _common_layout(kind: str, calls: list[AttentionCall], num_layers: int) -> AttentionLayout:
    if sorted(call.layer_idx for call in calls) != list(range(num_layers)):
        raise _unsupported(
            kind,
            f"{len(calls)} of its {num_layers} layers use attention that goes through transformers' interface once "
            "each; state-space and mixed layers aren't supported",
        )
    layouts = {(call.num_kv_heads, call.head_dim) for call in calls}
    if len(layouts) != 1:
        raise _unsupported(kind, f"its layers have different key-value heads: {sorted(layouts)}")
    heads, size = layouts.pop()
    return AttentionLayout(num_layers, heads, size)


def _unsupported(kind: str, reason: str, where: str | None = None) -> ModelError:
    return ModelError(
        f"the architecture {kind!r} isn't supported: {reason}",
        where=where or "the model's config.json",
        hint=f"supported and tested: {', '.join(PROVEN)}",
    )
