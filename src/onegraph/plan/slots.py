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

    Raises ConfigError for a dim without a size, a size without a dim, and an argument that can't be filled in place;
    ShapeOutOfRangeError.
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
        given = sizes[dim.name]
        if isinstance(given, bool) or not isinstance(given, int):
            raise ConfigError(f"{dim.name} = {given!r} is no whole number", where="slots")
        if not dim.min <= given <= dim.max:
            raise ShapeOutOfRangeError(
                f"{dim.name} = {given} is outside its declared range {dim.min}..{dim.max}", where="slots"
            )
    made: dict[str, torch.Tensor] = {}
    for argument in arguments:
        made[argument.path] = made[argument.twin] if argument.twin is not None else _zeros(argument, sizes)
    return made


def _zeros(argument: SizedArgument, sizes: Mapping[str, int]) -> torch.Tensor:
    if argument.refused is not None:
        raise ConfigError(f"there is no slot for {argument.path}, which {argument.refused}", where="slots")

    def numbers(expressions: Sequence[str]) -> list[int]:
        return [int(eval(one, {"Max": max}, dict(sizes))) for one in expressions]  # noqa: S307 - our own text

    shape = numbers(argument.shape)
    if argument.strides is None:
        return torch.zeros(shape, dtype=argument.dtype, device=argument.device)
    strides = numbers(argument.strides)
    last = sum((length - 1) * step for length, step in zip(shape, strides, strict=True)) if all(shape) else -1
    memory = torch.zeros(last + 1, dtype=argument.dtype, device=argument.device)
    return memory.as_strided(shape, strides)
