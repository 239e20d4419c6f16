"""Our attention in transformers' attention interface: what a layer asks for becomes two ops, or is refused.

Block tables, slots, lengths and caches arrive as keyword arguments that transformers hands down through its
`**kwargs`, so that they are inputs of the captured graph. There is no context beside them.

Letters: T tokens, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import onegraph.ops  # noqa: F401 - registers the ops
from onegraph.errors import ModelError
from onegraph.models.masks import MaskRequest, register_mask

ATTENTION = "onegraph_paged"
PROBE = "onegraph_probe"
"""Registered beside it: notes what each layer asks for, and computes nothing."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "dropout": (0, 0.0, None),
    "is_causal": (None, True),
    "use_cache": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_router_logits": (None, False),
    "return_dict": (None, True),
    "logits_to_keep": None,  # type: ignore[dict-item]
    "position_ids": None,  # type: ignore[dict-item]
    "cache_position": None,  # type: ignore[dict-item]
    "past_key_values": (None,),
    "num_items_in_batch": (None,),
    "inputs_embeds": (None,),
}
"""Arguments that say nothing about attention, with the values for which that is so; None stands for any value."""

_UNDERSTOOD = ("scaling", "sliding_window", "softcap", "s_aux")


@dataclass(frozen=True)
class AttentionCall:
    """What one layer asked for when the model was probed."""

    where: str
    layer_idx: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None
    mask: MaskRequest


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    slot_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    kv_caches: list[tuple[torch.Tensor, torch.Tensor]],
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention: query [1, H, T, D], key and value [1, K, T, D]; returns [1, T, H, D].

    The layer's cache is `kv_caches[module.layer_idx]`. Unknown arguments were refused by the probe when the
    model was loaded.
    """
    k_cache, v_cache = kv_caches[module.layer_idx]  # type: ignore[index]
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    torch.ops.onegraph.write_kv_cache(k, v, k_cache, v_cache, slot_mapping)
    out = torch.ops.onegraph.paged_attention(
        q,
        k_cache,
        v_cache,
        block_tables,
        query_start_loc,
        seq_lens,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window,
        softcap,
        s_aux,
    )
    return out[None], None


def probe_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    onegraph_seen: list[AttentionCall] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Notes what one layer asks for. Raises ModelError for what the ops don't do, by its name."""
    layer = f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"
    if onegraph_seen is None:
        raise ModelError("keyword arguments of the model's forward don't reach its attention", where=layer)
    for name, given in kwargs.items():
        neutral = _NEUTRAL.get(name, ())
        if name in _UNDERSTOOD or given is None or neutral is None or given in neutral:
            continue
        raise ModelError(f"the model's attention uses {name}={given!r:.60}, which isn't supported", where=layer)
    if getattr(module, "is_causal", True) is False:
        raise ModelError("the model's attention isn't causal", where=layer)
    if not isinstance(attention_mask, MaskRequest):
        raise ModelError(
            "the model's attention mask doesn't come from transformers' mask functions, so it can't be understood",
            where=layer,
        )
    if not isinstance(getattr(module, "layer_idx", None), int):
        raise ModelError("an attention layer has no layer_idx", where=layer)
    if key.shape != value.shape or query.shape[-1] != key.shape[-1] or query.shape[1] % key.shape[1]:
        raise ModelError(
            f"attention with queries {tuple(query.shape)}, keys {tuple(key.shape)} and values {tuple(value.shape)} "
            "isn't supported",
            where=layer,
        )
    window = kwargs.get("sliding_window")
    onegraph_seen.append(
        AttentionCall(layer, module.layer_idx, key.shape[1], key.shape[-1], window, attention_mask)  # type: ignore[arg-type]
    )
    return query.transpose(1, 2).contiguous(), None


def register() -> None:
    """Puts both functions into transformers' attention interface; doing it again changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, paged_attention)
    ALL_ATTENTION_FUNCTIONS.register(PROBE, probe_attention)
    register_mask(PROBE)
