"""What a build for another process leaves to that one: all that needs code that runs, or the values of weights.

Loading does it in any case, before the first call, so nothing of this is read there: it is for people.
"""

from __future__ import annotations

from collections.abc import Iterable

from onegraph.ir.linear import LinearShape
from onegraph.ir.target import Target
from onegraph.ir.weights import MergedWeight


def pending(
    target: Target, merged: Iterable[MergedWeight], linears: Iterable[LinearShape], *, uses_own_ops: bool
) -> tuple[str, ...]:
    """In words, one thing each."""
    num_groups = len(tuple(merged))
    shapes = dict.fromkeys(linears)
    found = ["the kernels are loaded, and called for the first time"]
    if uses_own_ops:
        found.append(f"the {target.op_kernels_kind}s of onegraph's ops are installed")
    if shapes and "linear_kernels" in target.facts:
        found.append(f"kernels of {len(shapes)} linear layers are chosen by measuring: {', '.join(map(str, shapes))}")
    if num_groups:
        found.append(f"{num_groups} groups of weights are merged, each in one block of memory")
    return tuple(found)
