"""Static inputs: tensors of given sizes, made once, that an engine fills in place before each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from onegraph.errors import ConfigError, ShapeOutOfRangeError
from onegraph.ir.dims import DynamicDim, SizedArgument


def allocate_slots(
    arguments: Sequence[SizedArgument], dims: Sequence[DynamicDim], size: int, others: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Zeros for each argument, by its path: of `size` in the first dim, and of `others` in the dims named there.

    Raises ConfigError for a dim without a size and a size without a dim, ShapeOutOfRangeError.
    """
    if not dims:
        raise ConfigError("there are no dynamic dims, so no size can be given", where="slots")
    sizes = {dims[0].name: size, **others}
    names = [dim.name for dim in dims]
    if dims[0].name in others or set(sizes) != set(names):
        raise ConfigError(
            f"slots need one size for each of {', '.join(names)}: {', '.join(sizes)} were given",
            where="slots",
            hint=f"slots({size}, {', '.join(f'{name}=…' for name in names[1:])})" if names[1:] else f"slots({size})",
        )
    for dim in dims:
        if not dim.min <= sizes[dim.name] <= dim.max:
            raise ShapeOutOfRangeError(
                f"{dim.name} = {sizes[dim.name]} is outside its declared range {dim.min}..{dim.max}", where="slots"
            )
    return {argument.path: _zeros(argument, sizes) for argument in arguments}


def _zeros(argument: SizedArgument, sizes: Mapping[str, int]) -> torch.Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in argument.shape]
    strides = [0] * len(shape)
    step = 1
    for index in reversed(argument.order):
        strides[index] = step
        step *= max(shape[index], 1)
    return torch.empty_strided(shape, strides, dtype=argument.dtype, device=argument.device).zero_()
