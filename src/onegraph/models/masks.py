"""Whether the mask that a model would make is the one that paged attention applies.

Models tell transformers' mask functions what they mean (causal, sliding, chunked, bidirectional) and attention
itself often only a part of it. Takes: that rule, as a function of positions, and the window that a layer asks
attention for. Gives: None, or the first pair of positions for which the two differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

MaskRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""transformers' form: (batch, head, query position, key position) -> whether the query may see the key."""

NEAR = 64
"""Positions up to this are all tried; beyond it those near powers of two and multiples of the window."""


@dataclass(frozen=True)
class MaskRequest:
    """Stands in for a mask while a model is probed: the rule from which transformers would have made it."""

    rule: MaskRule


def request_mask(*, mask_function: MaskRule, **kwargs: Any) -> MaskRequest:
    """The mask function of the probe, in transformers' interface for masks."""
    return MaskRequest(mask_function)


def register_mask(name: str) -> None:
    """Puts `request_mask` into transformers' interface under the name of an attention; repeating it changes nothing."""
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, request_mask)


def first_difference(mask: MaskRequest, window: int | None, num_positions: int) -> str | None:
    """None where `mask` is causal with that window; else the positions and what the model means for them.

    The rule is tried on pairs of positions below `num_positions`: small ones, those around powers of two (which
    chunks and windows mostly are), multiples of the window, and the window's edges.
    """
    near = {p + d for p in _landmarks(window, num_positions) for d in (-1, 0, 1)} | set(range(NEAR))
    positions = torch.tensor(sorted(p for p in near if 0 <= p < num_positions), device="cpu")
    edges = [0] if window is None else [0, window - 1, window, window + 1]
    keys = torch.cat([positions] + [positions - edge for edge in edges]).clamp(min=0).unique()
    query, key = positions[:, None], keys[None, :]
    zero = torch.zeros((), dtype=torch.int64, device="cpu")
    meant = torch.as_tensor(mask.rule(zero, zero, query, key)).expand(len(positions), len(keys))
    applied = key <= query if window is None else (key <= query) & (key > query - window)
    different = (meant != applied).nonzero()
    if not len(different):
        return None
    at, other = int(positions[different[0, 0]]), int(keys[different[0, 1]])
    sees = "sees" if bool(meant[different[0, 0], different[0, 1]]) else "doesn't see"
    return f"by its mask position {at} {sees} position {other}"


def _landmarks(window: int | None, num_positions: int) -> set[int]:
    powers = {1 << n for n in range(num_positions.bit_length() + 1)}
    return powers | {num_positions - 1} | (set() if window is None else {window, 2 * window, 3 * window})
