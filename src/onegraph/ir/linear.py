"""Which kernel runs a linear layer, for each number of tokens: shapes, choices, and what a device's op can do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch

PLAIN = "plain"
"""The kernel that is PyTorch's own."""

TOKENS = tuple(1 << power for power in range(10))
"""Numbers of tokens that a kernel is chosen for: 1 to 512. Others have the choice of the next larger one, or the last.

Kernels work on whole tiles of tokens, so that a number costs as much as the next larger tile; beyond 512 all of them
are limited by arithmetic, and keep their order.
"""


def choice_index(num_tokens: int) -> int:
    """The place in TOKENS of what a number of tokens (one or more) goes by."""
    return min((num_tokens - 1).bit_length(), len(TOKENS) - 1)


@dataclass(frozen=True)
class LinearShape:
    """A weight [outputs, inputs]."""

    outputs: int
    inputs: int
    dtype: torch.dtype

    def digest(self, machine: Mapping[str, Any]) -> str:
        """The sha256 (hex) of the shape on a machine, whose facts are JSON-able."""
        text = json.dumps([self.outputs, self.inputs, str(self.dtype), dict(machine)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        return f"linear {self.inputs} -> {self.outputs}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class LinearChoice:
    """For each of TOKENS the kernel, and the seconds of those that were measured: of none where the op's rule is taken.

    `measured_outputs` is how many of the weight's rows were measured; their seconds are scaled to all of them.
    """

    shape: LinearShape
    kernels: tuple[str, ...]
    seconds: tuple[Mapping[str, float], ...]
    measured_outputs: int

    @property
    def is_measured(self) -> bool:
        return any(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "outputs": self.shape.outputs,
            "inputs": self.shape.inputs,
            "dtype": str(self.shape.dtype).removeprefix("torch."),
            "measured_outputs": self.measured_outputs,
            "tokens": {
                str(tokens): {"kernel": kernel, "microseconds": {name: round(s * 1e6, 2) for name, s in times.items()}}
                for tokens, kernel, times in zip(TOKENS, self.kernels, self.seconds, strict=True)
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LinearChoice:
        """Raises AttributeError, KeyError, TypeError or ValueError for what `to_dict` doesn't make."""
        dtype = getattr(torch, data["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{data['dtype']} is no dtype")
        rows = [data["tokens"][str(tokens)] for tokens in TOKENS]
        return cls(
            LinearShape(int(data["outputs"]), int(data["inputs"]), dtype),
            tuple(str(row["kernel"]) for row in rows),
            tuple({str(name): float(us) / 1e6 for name, us in row["microseconds"].items()} for row in rows),
            int(data["measured_outputs"]),
        )

    def __str__(self) -> str:
        parts = []
        for kernel, group in groupby(zip(TOKENS, self.kernels, strict=True), key=lambda pair: pair[1]):
            last = list(group)[-1][0]
            parts.append(f"{kernel} from there on" if last == TOKENS[-1] else f"{kernel} up to {last}")
        if len(parts) == 1:
            parts = [self.kernels[0]]
        how = "" if self.is_measured else " (by rule: the machine was too busy to measure)"
        return f"{self.shape}, by tokens: {', '.join(parts)}{how}"


@runtime_checkable
class LinearOp(Protocol):
    """What a target gives for `onegraph::linear`: the op, which runs one of several kernels."""

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As the op, by the kernel that was chosen for the weight's shape, or by a rule for others."""
        ...

    def kernels(self, dtype: torch.dtype) -> tuple[str, ...]:
        """The names of those that can run in this process, PLAIN first."""
        ...

    def rule(self, dtype: torch.dtype) -> tuple[str, ...]:
        """The kernels, one for each of TOKENS, that run weights for which none were chosen."""
        ...

    def run(self, kernel: str, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Runs one of them: contiguous x [T, I], weight [O, I] and out [T, O], T >= 1."""
        ...

    def choose(self, shape: LinearShape, kernels: tuple[str, ...]) -> None:
        """Has weights of a shape run by these kernels, one for each of TOKENS, at the number of threads as it is."""
        ...
