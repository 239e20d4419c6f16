"""Dynamic dims: which sizes of a module's inputs may change between calls, and how far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DynamicDim:
    """A named size that may take any value in `min..max` (inclusive), wherever it occurs.

    `inputs` are the places in the caller's terms, such as `("input_ids[0]", "positions[0]")`.
    """

    name: str
    min: int
    max: int
    inputs: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        return {"name": self.name, "min": self.min, "max": self.max, "inputs": list(self.inputs)}


@dataclass(frozen=True)
class SizedArgument:
    """A tensor argument with declared dims: numbers, and expressions over the dims' names.

    `twin` is the path of an earlier argument that is the same tensor; `refused` is why nobody could fill in another
    tensor laid out like the example.
    """

    path: str
    shape: tuple[str, ...]
    strides: tuple[str, ...] | None
    """None for a contiguous tensor."""
    dtype: torch.dtype
    device: torch.device
    sources: tuple[str, ...] = ()
    """Dynamo's names for it."""
    twin: str | None = None
    refused: str | None = None
