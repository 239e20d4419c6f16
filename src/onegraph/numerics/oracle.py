"""Runs of one call for the oracle: compiled, eager, in fp64, and with fresh memory filled; none leaves a trace.

Takes the compiled and the original callable, and the arguments. Gives a Comparison. Arguments are cloned for
each run; buffers of the module and the random state are put back after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onegraph.numerics.compare import Comparison, compare, uninitialised
from onegraph.torch_compat import pytree
from onegraph.torch_compat.op_modes import FilledMemory, InFloat64

_FILLS = (1.0, -3.0)


@dataclass(frozen=True)
class SizeCheck:
    """A Comparison at one size of the dynamic dim."""

    num_tokens: int
    found: Comparison

    @property
    def ok(self) -> bool:
        """Whether compiled is as near to the truth as eager, within the stated factor."""
        return self.found.ok

    def to_dict(self) -> dict[str, object]:
        return {
            "num_tokens": self.num_tokens,
            "max_error": self.found.max_error,
            "eager_error": self.found.eager_error,
            "ok": self.found.ok,
        }


def check_call(
    compiled: Callable[..., Any],
    original: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shared: Mapping[str, Any] | None = None,
) -> Comparison:
    """Compares one call of `compiled` with the same call of `original`, results and written arguments alike.

    `shared` are further keyword arguments, too large to be cloned: each run writes them anew before it reads.
    Raises what either of them raises.
    """
    owner = getattr(original, "__self__", original)

    def run(function: Callable[..., Any]) -> Any:
        given = _cloned((args, kwargs))
        with _undone(owner), torch.no_grad():
            result = function(*given[0], **given[1], **(shared or {}))
            return _cloned((_plain(result), [t for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor)]))

    def filled(value: float) -> Any:
        with FilledMemory(value):
            return run(original)

    found, eager = run(compiled), run(original)
    with InFloat64():
        truth = run(original)
    return compare(found, eager, truth, uninitialised(filled(_FILLS[0]), filled(_FILLS[1])))


def _plain(result: Any) -> Any:
    """The result as nested built-in containers, whatever classes it is made of."""
    if isinstance(result, dict):
        return {key: _plain(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [_plain(value) for value in result]
    if hasattr(result, "__dict__") and not isinstance(result, torch.Tensor):
        return {key: _plain(value) for key, value in vars(result).items()}
    return result


def _cloned(values: Any) -> Any:
    """A copy of all tensors; those that are one stay one."""
    copies: dict[int, torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in copies:
            with torch.no_grad():
                copies[id(value)] = value.detach().clone(memory_format=torch.preserve_format)
        return copies[id(value)]

    return pytree.tree_map(copy, values)


@contextlib.contextmanager
def _undone(owner: Any) -> Iterator[None]:
    """Buffers, attributes of the modules and the random state as they were, whatever the block does to them."""
    modules = list(owner.modules()) if isinstance(owner, torch.nn.Module) else []
    attributes = [(space, dict(space)) for module in modules for space in (vars(module), module._buffers)]
    buffers = list(owner.buffers()) if modules else []
    before = [buffer.detach().clone() for buffer in buffers]
    devices = sorted({buffer.device.index or 0 for buffer in buffers if buffer.device.type != "cpu"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for space, values in attributes:
                space.clear()
                space.update(values)
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
