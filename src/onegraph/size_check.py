"""Compiled against eager and fp64 at chosen sizes: 1, 2, the largest, around constraints, around powers of two.

Takes a compiled callable, its original and an example call. Gives a SizeCheck for each size; the example's rows
are repeated or cut to the size, so that whatever indices they hold stay valid.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from onegraph.built import SizedCall
from onegraph.capture.inputs import read_call
from onegraph.capture.signatures import call_signature
from onegraph.errors import ConfigError
from onegraph.ir.dims import DynamicDim
from onegraph.ir.ledger import ShapeEntry
from onegraph.numerics.oracle import SizeCheck, check_call
from onegraph.torch_compat import pytree


def sizes_to_check(dim: DynamicDim, constraints: Iterable[ShapeEntry], num_sizes: int) -> tuple[int, ...]:
    """The sizes, ascending: 1, 2, the range's ends and the neighbours of each constraint's numbers in any case, and
    of the powers of two and their neighbours as many as make `num_sizes`, evenly spread.
    """
    numbers = {
        int(number)
        for entry in constraints
        if re.search(rf"\b{re.escape(dim.name)}\b", entry.expr)
        for number in re.findall(r"\b\d+\b", entry.expr)
    }
    wanted = {1, 2, dim.min, dim.max} | {number + step for number in numbers for step in (-1, 0, 1)}
    chosen = {size for size in wanted if dim.min <= size <= dim.max}
    powers = [2**k + step for k in range(2, dim.max.bit_length() + 1) for step in (-1, 0, 1)]
    further = [size for size in powers if dim.min <= size <= dim.max and size not in chosen]
    count = max(0, min(len(further), num_sizes - len(chosen)))
    chosen |= {further[i * len(further) // count] for i in range(count)}
    return tuple(sorted(chosen))


def check_sizes(
    compiled: Callable[..., Any],
    original: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    dynamic_shapes: Any,
    max_size: int,
    constraints: Iterable[ShapeEntry],
    num_sizes: int,
) -> Iterator[SizeCheck]:
    """Checks the sizes of the first declared dim; other dims go along, as far as their ranges allow.

    Raises ConfigError if the example doesn't fit the declared dims.
    """
    inputs = read_call(call_signature(original), args, kwargs, dynamic_shapes, max_size)
    if not inputs.dims:
        yield SizeCheck(0, check_call(compiled, original, args, kwargs))
        return
    by_tensor: dict[int, Mapping[int, DynamicDim]] = {}
    for leaf in inputs.leaves:
        if isinstance(leaf.value, torch.Tensor) and leaf.dims:
            by_tensor[id(leaf.value)] = leaf.dims
    for size in sizes_to_check(inputs.dims[0], constraints, num_sizes):
        sizes = {dim.name: min(max(size, dim.min), dim.max) for dim in inputs.dims}
        resized_args, resized_kwargs = _resized(args, kwargs, by_tensor, sizes)
        yield SizeCheck(size, check_call(compiled, original, resized_args, resized_kwargs))


def sized_calls(
    original: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    dynamic_shapes: Any,
    max_size: int,
    sizes: Iterable[int],
) -> Iterator[SizedCall]:
    """The example call at each of the sizes of its only declared dim; the call itself where there is none.

    Raises ConfigError as `check_sizes`, and for a tensor that can't be replaced where it stands.
    """
    signature = call_signature(original)
    inputs = read_call(signature, args, kwargs, dynamic_shapes, max_size)
    if not inputs.dims:
        yield SizedCall(0, args, kwargs, {})
        return
    (dim,) = inputs.dims
    by_tensor = {id(leaf.value): leaf.dims for leaf in inputs.leaves if leaf.dims}
    for size in sizes:
        resized_args, resized_kwargs = _resized(args, kwargs, by_tensor, {dim.name: size})
        leaves = read_call(signature, resized_args, resized_kwargs, dynamic_shapes, max_size).leaves
        tensors = {leaf.path: leaf.value for leaf in leaves if leaf.dims}
        for leaf in leaves:
            if any(leaf.value.shape[index] != size for index in leaf.dims):
                raise ConfigError(
                    f"{leaf.path} stands in an object whose tensors can't be replaced, so it has no other size",
                    where="warm_up",
                    hint="record() takes a call of each size",
                )
        yield SizedCall(size, resized_args, resized_kwargs, tensors)


def _resized(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    by_tensor: Mapping[int, Mapping[int, DynamicDim]],
    sizes: Mapping[str, int],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def resize(value: Any) -> Any:
        dims = by_tensor.get(id(value), {}) if isinstance(value, torch.Tensor) else {}
        for index, dim in dims.items():
            if not value.shape[index]:
                raise ConfigError(
                    f"an example whose size is 0 at dim {index} has no rows that could be repeated",
                    hint="give an example of one row or more",
                )
            rows = itertools.islice(itertools.cycle(range(value.shape[index])), sizes[dim.name])
            value = value.index_select(index, torch.tensor(list(rows), dtype=torch.long, device=value.device))
        return value

    return pytree.tree_map(resize, (args, kwargs))  # type: ignore[no-any-return]
