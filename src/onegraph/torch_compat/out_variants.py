"""Functional operators by their overloads that write into given memory, where these give the same bits.

Takes a call and the results that it gave; gives a call that writes the results anew, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from onegraph.torch_compat.operator_calls import operator_call
from onegraph.torch_compat.operators import named_arguments

_TORCHS = "aten"
_OF_FACTORIES = frozenset({"dtype", "layout", "device", "pin_memory"})
"""Arguments that say what `out` shows."""
_UNDECLARED = frozenset({"running_mean", "running_var"})
"""What aten's older normalisations change without a word in their schemas: they can't be run for a trial."""


def out_variant(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[torch.Tensor]
) -> Callable[[], Any] | None:
    """A call of an overload of an operator of aten that writes `results`; it was tried on other memory and compared."""
    given = named_arguments(func, tuple(args), kwargs)
    returns = [str(one.type) for one in func._schema.returns]
    if func.namespace != _TORCHS or returns != ["Tensor"] * len(results) or _UNDECLARED & given.keys():
        return None
    for name in func._overloadpacket.overloads():
        overload = getattr(func._overloadpacket, name)
        outs = _outs(func, overload)
        if len(outs) != len(results):
            continue
        positional, named = _bound(overload, given, set(outs))
        trial = [torch.empty_strided(one.size(), one.stride(), dtype=one.dtype, device=one.device) for one in results]
        tried = partial(overload, *positional, **named, **dict(zip(outs, trial, strict=True)))
        if _gives(tried, trial, results):
            return operator_call(overload, positional, {**named, **dict(zip(outs, results, strict=True))})
    return None


def _outs(func: Any, overload: Any) -> list[str]:
    """The names of what an overload writes, if it takes what `func` takes besides."""
    arguments = overload._schema.arguments
    outs = [one.name for one in arguments if one.kwarg_only and one.alias_info is not None and one.alias_info.is_write]
    ours = {one.name: str(one.type) for one in func._schema.arguments}
    theirs = {one.name: str(one.type) for one in arguments if one.name not in outs}
    is_same = all(ours.get(name) == kind for name, kind in theirs.items())
    return outs if is_same and ours.keys() - theirs.keys() <= _OF_FACTORIES else []


def _bound(overload: Any, given: Mapping[str, Any], outs: set[str]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of an overload but `outs`, by position and by name."""
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for one in overload._schema.arguments:
        if one.name in outs or (one.name not in given and one.kwarg_only):
            continue
        value = given.get(one.name, one.default_value)
        if one.kwarg_only:
            named[one.name] = value
        else:
            positional.append(value)
    return positional, named


def _gives(call: Callable[[], Any], trial: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> bool:
    places = [(one.data_ptr(), one.stride()) for one in trial]
    try:
        call()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return False
    stays = places == [(one.data_ptr(), one.stride()) for one in trial]
    return stays and all(map(_same_bits, trial, results))


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    flat = [one.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for one in (first, second)]
    return bool(torch.equal(*flat))
