"""Comparison of a compiled result with eager's, both judged by their distance to a reference.

Takes three results of the same structure. Gives one Comparison. An error is the largest difference to the
reference in a tensor, relative to the tensor's largest magnitude. Compiled code may round differently from eager,
so it is judged by how far eager itself is from the truth: the method of torch's own `same` with an fp64 baseline
(torch/_dynamo/utils.py), with a maximum instead of a root mean square, so that one wrong element is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from onegraph.torch_compat import pytree

FACTOR = 4.0
"""Compiled may be so many times as far from the truth as eager: another order of summation is within it."""
ROUNDINGS = 8.0
"""So many units of rounding of the dtype are allowed in any case; where eager is exact, compiled may round."""


@dataclass(frozen=True)
class Comparison:
    """`max_error` of compiled and `eager_error` of eager, both relative to the reference (0 is equal).

    `where` names the worst place that isn't ok: the path of the leaf, the index, and the three values.
    """

    max_error: float
    eager_error: float
    ok: bool
    where: str | None = None


def compare(compiled: Any, eager: Any, reference: Any, masks: Any = None) -> Comparison:
    """Judges `compiled`, a nested structure of tensors and other values, by eager's and the reference's.

    `masks` has a bool tensor or None for each leaf: elements that are true are left out (see
    `uninitialised`). NaN and infinities must stand at the same places with the same sign as eager's; whole
    numbers, bools and other values must be equal.
    """
    found, wanted = pytree.tree_flatten_with_path(compiled)[0], pytree.tree_leaves(eager)
    truths = pytree.tree_leaves(reference)
    leaves_masks = pytree.tree_leaves(masks, is_leaf=lambda m: m is None) if masks is not None else [None] * len(found)
    if not len(found) == len(wanted) == len(truths):
        return Comparison(float("inf"), 0.0, False, f"{len(found)} values instead of {len(wanted)}")
    worst = Comparison(0.0, 0.0, True)
    for (path, value), expected, truth, mask in zip(found, wanted, truths, leaves_masks, strict=True):
        one = _compare_leaf(pytree.keystr(path) or "result", value, expected, truth, mask)
        worst = max(worst, one, key=lambda c: (not c.ok, c.max_error))
    return worst


def _compare_leaf(path: str, value: Any, expected: Any, truth: Any, mask: torch.Tensor | None) -> Comparison:
    if not isinstance(expected, torch.Tensor):
        same = type(value) is type(expected) and (value == expected or value != value)
        return Comparison(0.0 if same else float("inf"), 0.0, bool(same), None if same else f"{path}: {value!r:.80}")
    if not isinstance(value, torch.Tensor) or value.shape != expected.shape or value.dtype != expected.dtype:
        return Comparison(float("inf"), 0.0, False, f"{path}: {_kind(value)} instead of {_kind(expected)}")
    if mask is not None:
        keep = ~mask
        value, expected, truth = value[keep], expected[keep], truth[keep]
    if not value.numel():
        return Comparison(0.0, 0.0, True)
    if not (expected.is_floating_point() or expected.is_complex()):
        different = value != expected
        if bool(different.any()):
            return Comparison(float("inf"), 0.0, False, _told(path, different, value, expected, truth))
        return Comparison(0.0, 0.0, True)
    if value.is_complex():
        value, expected, truth = map(torch.view_as_real, (value, expected, truth))
    finite = expected.isfinite()
    misplaced = (value.isfinite() != finite) | (value.isnan() != expected.isnan())
    misplaced |= expected.isinf() & (value.sign() != expected.sign())
    if bool(misplaced.any()):
        return Comparison(float("inf"), 0.0, False, _told(path, misplaced, value, expected, truth))
    exact = torch.where(finite & truth.isfinite(), truth.double(), 0.0)
    scale = max(float(exact.abs().max()), torch.finfo(torch.float32).tiny)
    compiled_errors = torch.where(finite & truth.isfinite(), (value.double() - exact).abs(), 0.0) / scale
    eager_errors = torch.where(finite & truth.isfinite(), (expected.double() - exact).abs(), 0.0) / scale
    error, eager_error = float(compiled_errors.max()), float(eager_errors.max())
    ok = error <= FACTOR * eager_error + ROUNDINGS * torch.finfo(expected.dtype).eps
    where = None if ok else _told(path, compiled_errors == compiled_errors.max(), value, expected, truth)
    return Comparison(error, eager_error, ok, where)


def uninitialised(first: Any, second: Any) -> Any:
    """Masks of what differs between two eager runs whose fresh memory was filled differently; None for no tensor."""

    def differs(a: Any, b: Any) -> Any:
        if not isinstance(a, torch.Tensor):
            return None
        same = (a == b) | ((a != a) & (b != b))
        return ~same

    leaves = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=True)
    return [differs(a, b) for a, b in leaves]


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _told(path: str, places: torch.Tensor, value: torch.Tensor, expected: torch.Tensor, truth: torch.Tensor) -> str:
    index = tuple(int(i) for i in places.nonzero()[0])
    return (
        f"{path}{list(index)}: compiled {value[index].item()!r}, eager {expected[index].item()!r}, "
        f"reference {truth[index].item()!r}"
    )
