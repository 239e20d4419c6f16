"""`onegraph::linear` on the CPU: for each call PyTorch's kernel, or one of vectors, blocks or matrix instructions.

All of them read the weight where it lies, row by row: there is no packed copy that takes memory and could be stale.
Takes the built library's functions. What the kernels don't do is left to PyTorch: dtypes beside fp32 and bf16, weights
whose rows aren't contiguous, and inputs whose rows aren't, or lie at no fixed distance.

Letters: T tokens, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from onegraph.ir.linear import PLAIN, TOKENS, LinearShape, choice_index
from onegraph.ops import linear as reference

VECTOR, BLOCKED, MATRIX = "vector", "blocked", "amx"

_MAX_VECTOR_TOKENS = {MATRIX: 1, BLOCKED: 8, PLAIN: 4}
"""Where nothing was measured, the vector kernel runs up to so many tokens, by which one runs more of them."""
_MAX_MATRIX_TOKENS = 256

Kernel = Callable[..., None]


class Linear:
    """Implements `ir.linear.LinearOp`."""

    def __init__(self, library: Mapping[str, Any]) -> None:
        self._kernels: dict[torch.dtype, dict[str, Kernel | None]] = {
            torch.float32: {PLAIN: None, VECTOR: library["linear_float"]},
            torch.bfloat16: {PLAIN: None, VECTOR: library["linear_bfloat16"]},
        }
        if "linear_by_blocks_bfloat16" in library:  # where there are no instructions for bf16
            self._kernels[torch.float32][BLOCKED] = library["linear_by_blocks_float"]
            self._kernels[torch.bfloat16][BLOCKED] = library["linear_by_blocks_bfloat16"]
        if _has_matrices(library):
            self._kernels[torch.bfloat16][MATRIX] = library["linear_by_matrices"]
        self._chosen: dict[tuple[int, int, torch.dtype, int], tuple[Kernel | None, ...]] = {}
        self._by_rule = {dtype: tuple(map(kernels.get, self.rule(dtype))) for dtype, kernels in self._kernels.items()}

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`out` is contiguous memory for the result, which may come elsewhere where the kernels don't do it."""
        dtype, shape, strides = x.dtype, x.shape, x.stride()
        num_dims = len(shape)
        if num_dims == 2:
            num_tokens, stride = shape[0], strides[0]
        elif num_dims == 3 and shape[0] == 1:
            num_tokens, stride = shape[1], strides[1]
        elif num_dims and x.is_contiguous():
            num_tokens, stride = x.numel() // max(shape[-1], 1), shape[-1]
        else:
            return reference.linear(x, weight, bias)
        if not (
            dtype in self._kernels
            and weight.dtype is dtype
            and weight.dim() == 2
            and strides[-1] == 1
            and weight.stride(1) == 1
            and shape[-1] == weight.shape[1] > 0
            and (bias is None or (bias.dtype is dtype and bias.is_contiguous() and bias.shape == weight.shape[:1]))
        ):
            return reference.linear(x, weight, bias)
        outputs, inputs = weight.shape
        if out is None:
            out = x.new_empty(*shape[:-1], outputs)
        if num_tokens == 0 or outputs == 0:
            return out
        threads = torch.get_num_threads()
        chosen = self._chosen.get((outputs, inputs, dtype, threads)) or self._by_rule[dtype]
        kernel = chosen[choice_index(num_tokens)]
        if kernel is None:
            _plain(x.view(num_tokens, inputs), weight, bias, out.view(num_tokens, outputs))
        else:
            kernel(out, x, weight, bias, num_tokens, outputs, inputs, stride, weight.stride(0), threads)
        return out

    def kernels(self, dtype: torch.dtype) -> tuple[str, ...]:
        return tuple(self._kernels.get(dtype, (PLAIN,)))

    def rule(self, dtype: torch.dtype) -> tuple[str, ...]:
        known = self.kernels(dtype)
        most = BLOCKED if BLOCKED in known and dtype == torch.bfloat16 else PLAIN  # PyTorch's is as fast in fp32
        more = MATRIX if MATRIX in known else most
        few, some = _MAX_VECTOR_TOKENS[more], _MAX_MATRIX_TOKENS
        return tuple(VECTOR if tokens <= few else more if tokens <= some else most for tokens in TOKENS)

    def run(self, kernel: str, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        function = self._kernels[x.dtype][kernel]
        if function is None:
            _plain(x, weight, None, out)
        else:
            function(
                out,
                x,
                weight,
                None,
                x.shape[0],
                *weight.shape,
                *weight.shape[1:],
                weight.stride(0),
                torch.get_num_threads(),
            )

    def choose(self, shape: LinearShape, kernels: tuple[str, ...]) -> None:
        known = self._kernels[shape.dtype]
        key = (shape.outputs, shape.inputs, shape.dtype, torch.get_num_threads())
        self._chosen[key] = tuple(known[name] for name in kernels)


def _has_matrices(library: Mapping[str, Any]) -> bool:
    if "linear_by_matrices" not in library:
        return False
    try:
        library["check_matrices"]()
    except RuntimeError:
        return False
    return True


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """PyTorch's kernel, as eager and Inductor's wrapper call it."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
