"""Launches of our Triton kernels: the first by Triton's own front end, later ones straight with what that compiled.

The front end binds every argument anew at each launch, which takes longer than most of our kernels. What it looks at
has to be told here: the constants, and by the caller the dtypes and numbers that a kernel is specialised on.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

_ALIGNMENT = 16
_compiled: dict[Hashable, tuple[Any, list[Any]]] = {}


@functools.cache
def kernels() -> Any:
    """Imported when it is first needed: a torch for the CPU comes without Triton."""
    return importlib.import_module("onegraph.targets.cuda.kernels")


def launch(
    name: str,
    grid: tuple[int, int, int],
    args: Sequence[Any],
    constants: Mapping[str, Any],
    *,
    specialised: Hashable,
    aligned: Sequence[torch.Tensor],
    num_warps: int = 4,
) -> None:
    """Launches a kernel of `kernels.py` on the current stream of the current device.

    `args` are the kernel's first parameters, in order; `constants` the others, by name. `specialised` is all else that
    the kernel is compiled for: the dtypes of `args`, the numbers that aren't in its do_not_specialize, the device.
    `aligned` are the tensors whose alignment it is compiled for, too.
    """
    key = (name, specialised, num_warps, *constants.values())
    found = _compiled.get(key)
    is_usual = all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in aligned)
    if found is not None and is_usual:
        kernel, rest = found
        kernel[grid](*args, *rest)
        return
    front = getattr(kernels(), name)
    compiled = front[grid](*args, **constants, num_warps=num_warps)
    if is_usual and compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled, [constants[parameter] for parameter in front.arg_names[len(args) :]]
