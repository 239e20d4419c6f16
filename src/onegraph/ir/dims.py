"""Dynamic dims: which sizes of a module's inputs may change between calls, and how far."""

from __future__ import annotations

from dataclasses import dataclass


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
