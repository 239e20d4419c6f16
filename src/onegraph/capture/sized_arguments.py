"""The arguments with declared dims, as data from which others of any size can be allocated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from onegraph.capture.inputs import CallInputs
from onegraph.ir.dims import SizedArgument
from onegraph.torch_compat import shapes


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
            twin=twin if twin != leaf.path else None,
            refused=_refused(value),
        )


def _text(step: Any, symbols: Mapping[str, str]) -> str:
    text = str(shapes.expression(step, None))
    return re.sub(r"\b[a-z]+\d+\b", lambda found: symbols.get(found[0], found[0]), text)


def _refused(value: torch.Tensor) -> str | None:
    if any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape, strict=True)):
        return "was expanded: its elements share memory"
    return "is conjugated or negated lazily" if value.is_conj() or value.is_neg() else None
