"""ExecutionPlan: the calls of one compiled graph with the values that go in and out, and when each value ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlanCall:
    """One piece's call: `inputs` and `outputs` are names of values, `frees` those that nobody uses afterwards."""

    piece: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    frees: tuple[str, ...]
    comment: str = ""


@dataclass(frozen=True)
class ExecutionPlan:
    """`inputs` are the graph's placeholders (weights, sizes, tensors) in order; `results` its outputs.

    A result is the name of a value, or a constant that isn't a string. `size` is an expression over the inputs for
    the size of the first declared dim; None where there is no such dim.
    """

    inputs: tuple[str, ...]
    calls: tuple[PlanCall, ...]
    results: tuple[Any, ...]
    size: str | None = None
