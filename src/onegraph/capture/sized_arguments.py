"""The arguments with declared dims, as data from which others of any size can be allocated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from onegraph.capture.inputs import CallInputs
from onegraph.errors import CaptureError
from onegraph.ir.dims import SizedArgument


def sized_arguments(
    inputs: CallInputs, fakes: Mapping[str, Any], symbols: Mapping[str, str]
) -> Iterator[SizedArgument]:
    """Each tensor with a declared dim. `fakes` and `symbols` are as for `input_contract`, whose strides these have."""
    first: dict[int, str] = {}
    for leaf in inputs.leaves:
        if not leaf.dims:
            continue
        value, fake = leaf.value, fakes.get(leaf.source, fakes.get(leaf.indexed_source))
        strides = None
        if not value.is_contiguous():
            steps = fake.stride() if isinstance(fake, torch.Tensor) else value.stride()
            strides = tuple(_text(step, symbols) for step in steps)
        twin = first.setdefault(id(value), leaf.path)
        yield SizedArgument(
            path=leaf.path,
            shape=tuple(leaf.dims[i].name if i in leaf.dims else f"{size}" for i, size in enumerate(value.shape)),
            strides=strides,
            dtype=value.dtype,
            device=value.device,
            sources=tuple(filter(None, (leaf.source, leaf.indexed_source))),
            twin=twin if twin != leaf.path else None,
            refused=_refused(value),
        )


def dynamic_strides(
    inputs: CallInputs, fakes: Mapping[str, Any], symbols: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """The strides of each argument that isn't contiguous, by its path, as the graph has them.

    They are expressions over `_d0`, `_d1` …, the sizes of the declared dims in their order. `fakes` are the graph's
    symbolic values by Dynamo's source name. Raises CaptureError for those that follow another size.
    """
    from onegraph.torch_compat import shapes  # imports sympy, which a warm start doesn't need

    order = {dim.name: f"_d{index}" for index, dim in enumerate(inputs.dims)}
    names = {symbol: order[name] for symbol, name in symbols.items()}
    found: dict[str, tuple[str, ...]] = {}
    for leaf in inputs.leaves:
        value, fake = leaf.value, fakes.get(leaf.source, fakes.get(leaf.indexed_source))
        if not isinstance(fake, torch.Tensor) or not isinstance(value, torch.Tensor):
            continue
        if value.layout == torch.strided and not value.is_contiguous():
            expressions = [shapes.expression(step, None) for step in fake.stride()]
            if any(str(symbol) not in names for one in expressions for symbol in one.free_symbols):
                raise follows_another_size(leaf.path)
            found[leaf.path] = tuple(_text(step, names) for step in fake.stride())
    return found


def other_strides(inputs: CallInputs, strides: Mapping[str, tuple[str, ...]]) -> str | None:
    """The first argument of this call that doesn't lie as `dynamic_strides` says of another one's, in words."""
    order = {dim.name: f"_d{index}" for index, dim in enumerate(inputs.dims)}
    sizes: dict[str, int] = {}
    for leaf in inputs.leaves:
        for index, dim in leaf.dims.items():
            sizes.setdefault(order[dim.name], leaf.value.shape[index])
    for leaf in inputs.leaves:
        if leaf.path in strides and not leaf.value.is_contiguous() and leaf.value.numel():
            wanted = tuple(eval(step, {}, sizes) for step in strides[leaf.path])  # noqa: S307 - arithmetic on sizes
            if leaf.value.stride() != wanted:
                return f"{leaf.path}: its strides were {wanted}, and are {leaf.value.stride()}"
    return None


def follows_another_size(path: str) -> CaptureError:
    """The error for strides that follow from no declared dim's size."""
    return CaptureError(
        f"the strides of {path} depend on a size that isn't one of its declared dims",
        where=path,
        hint="pass it contiguous: tensor.contiguous()",
    )


def _text(step: Any, symbols: Mapping[str, str]) -> str:
    from onegraph.torch_compat import shapes

    text = str(shapes.expression(step, None))
    return re.sub(r"\b[a-z]+\d+\b", lambda found: symbols.get(found[0], found[0]), text)


def _refused(value: torch.Tensor) -> str | None:
    if any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True)):
        return "was expanded: its elements share memory"
    return "is conjugated or negated lazily" if value.is_conj() or value.is_neg() else None
