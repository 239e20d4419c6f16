"""A function run on fake tensors of chosen sizes, apart from whatever is being traced at the moment.

Takes fake tensors and sizes as a trace has them, and numbers for their symbols; gives fake results with plain
sizes. The trace's own shape environment learns nothing: no branch of the function becomes a guard of the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

Sizes = Mapping[Any, int]
"""Symbol of torch -> the number that stands for it."""


def symbol_ranges(values: Any) -> dict[Any, tuple[int, int | None]]:
    """The symbols in the sizes of a nest of tensors and sizes, in order of appearance, with their bounds.

    An upper bound that isn't finite is None.
    """
    found: dict[Any, tuple[int, int | None]] = {}
    for size in _sizes(tree_leaves(values)):
        if isinstance(size, torch.SymInt):
            shape_env = size.node.shape_env
            for symbol in sorted(shape_env.replace(size.node.expr).free_symbols, key=str):
                bounds = shape_env.var_to_range[symbol]
                lower, upper = (
                    int(b) if b.is_finite and abs(b) < 2**62 else None for b in (bounds.lower, bounds.upper)
                )
                found.setdefault(symbol, (lower or 0, upper))
    return found


def _sizes(leaves: Iterable[Any]) -> Iterable[Any]:
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            yield from (*leaf.shape, *leaf.stride(), leaf.storage_offset())
        else:
            yield leaf


def size_at(size: Any, sizes: Sizes) -> int:
    """The number that a size is when its symbols have the given values."""
    if isinstance(size, torch.SymInt):
        return int(size.node.shape_env.replace(size.node.expr).xreplace(dict(sizes)))
    return int(size)


def run_on_fakes(function: Callable[..., Any], args: Any, kwargs: Any, sizes: Sizes) -> Any:
    """The function's result on fake tensors like the given ones at these sizes. Real tensors it reads are faked.

    Raises what the function raises: also where it looks at data, which fake tensors don't have.
    """

    def at_sizes(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            shape = [size_at(s, sizes) for s in value.shape]
            stride = [size_at(s, sizes) for s in value.stride()]
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return size_at(value, sizes) if isinstance(value, torch.SymInt) else value

    with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        args, kwargs = tree_map(at_sizes, (args, kwargs))
        return function(*args, **kwargs)


def mode_of(values: Iterable[Any], otherwise: Any) -> Any:
    """The mode in which fake values were traced. Dynamo gives its backend another one, which refuses them."""
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), otherwise)


def bind_symbols(fake: Any, real: Any, sizes: dict[Any, int]) -> None:
    """Notes in `sizes` what the symbols that are whole sizes of a fake value stand for in its real value."""
    if isinstance(fake, torch.Tensor) and isinstance(real, torch.Tensor):
        for size, number in zip(fake.shape, real.shape, strict=False):
            bind_symbols(size, number, sizes)
    elif isinstance(fake, torch.SymInt) and isinstance(real, int):
        expr = fake.node.shape_env.replace(fake.node.expr)
        if expr.is_Symbol:
            sizes.setdefault(expr, real)


def stands_for(real: Any, fake: Any, sizes: dict[Any, int]) -> bool:
    """Whether a real value may stand in a fake one's place. `sizes` has what symbols stand for, and gets new ones."""
    if isinstance(fake, torch.Tensor):
        return (
            isinstance(real, torch.Tensor)
            and (real.dtype, real.device.type, real.dim()) == (fake.dtype, fake.device.type, fake.dim())
            and all(stands_for(number, size, sizes) for number, size in zip(real.shape, fake.shape, strict=True))
        )
    if isinstance(fake, torch.SymInt) and isinstance(real, int):
        bind_symbols(fake, real, sizes)
        return known_size(fake, sizes) in (None, real)
    return type(real) is type(fake) and (real == fake or not isinstance(fake, int))


def known_size(size: Any, sizes: Sizes) -> int | None:
    """The number that a size is under `sizes`; None where it has symbols that aren't known."""
    try:
        return size_at(size, sizes)
    except TypeError:
        return None
