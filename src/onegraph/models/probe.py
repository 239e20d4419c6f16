"""One call of a model's own Python on the meta device: no weights, no arithmetic, but all that it asks of attention.

Takes a transformers config. Gives what each attention layer asked for; raises ModelError for what a flat batch
can't do: other ways to mix tokens, positions that aren't used, logits for rows that weren't asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from onegraph.errors import ModelError
from onegraph.models.attention import PROBE, AttentionCall, register
from onegraph.models.experts import experts_argument, register_experts
from onegraph.models.rotary import fix_frequencies

MIXERS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.RNNBase)
"""Modules that carry values from one token to another, across the requests of a flat batch."""

_ASK_FOR_FACTS = ("__get__", "size", "dim", "stride", "numel", "is_contiguous", "data_ptr")


def probe(config: Any, trust_remote_code: bool) -> list[AttentionCall]:
    """Calls the model with three tokens and asks for the logits of two of them."""
    register()
    register_experts()
    config = copy.deepcopy(config)
    config.pad_token_id = None  # with one, transformers looks for it in the ids, which meta tensors don't have
    ids, positions, mask = (torch.zeros(1, 3, dtype=torch.int64, device="meta") for _ in range(3))
    rows = torch.zeros(2, dtype=torch.int64, device="meta")
    seen: list[AttentionCall] = []
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=PROBE, trust_remote_code=trust_remote_code, **experts_argument(config)
        ).eval()
        _refuse_mixers(model)
        fix_frequencies(model)
        with _Uses(positions) as positions_are:
            # with a 2-d mask transformers doesn't look for packed sequences in the positions, which needs values
            output = model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                use_cache=False,
                logits_to_keep=rows,
                onegraph_seen=seen,
            )
    if seen and not positions_are.used:
        raise ModelError("it doesn't use the positions that it is given")
    if tuple(output.logits.shape[:2]) != (1, len(rows)):
        raise ModelError(f"logits_to_keep={len(rows)} rows gives logits of shape {tuple(output.logits.shape)}")
    return seen


def _refuse_mixers(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, MIXERS):
            raise ModelError(
                f"{type(module).__name__} mixes tokens outside of attention, as state-space layers do", where=name
            )
    if getattr(model, "_is_stateful", False):
        raise ModelError("it keeps a state beside the KV cache, as state-space models do")


class _Uses(TorchFunctionMode):
    """Notes whether anything is computed from a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor = tensor
        self.used = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _ASK_FOR_FACTS:
            given = [*args, *kwargs.values()]
            inner = [part for value in given if isinstance(value, tuple | list) for part in value]  # as in x[i, :]
            self.used |= any(value is self.tensor for value in given + inner)
        return func(*args, **kwargs)
