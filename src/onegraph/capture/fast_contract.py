"""The fast path of the input contract: one condition that only calls which keep the contract fulfil."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from onegraph.capture.inputs import CallInputs, Container
from onegraph.torch_compat.tensor_checks import tensor_check


def fast_path(
    inputs: CallInputs,
    constant: Callable[[Any], str],
    shared: Sequence[str],
    size_names: Mapping[str, str],
    required_alignment: Callable[[int], int],
) -> str | None:
    """A condition that is true only for calls that keep the contract, with the tensors compared by one C++ call.

    None where there is no such condition. A call that it refuses is judged by the checks, which say what is wrong;
    so it may refuse too much, and never too little. Autocast is among the dispatch keys that C++ compares.

    `constant(value)` names an object, `shared` are conditions of the checks under which a call is refused,
    `size_names` the variables for the sizes of declared dims.
    """
    leaves = [leaf for leaf in inputs.leaves if isinstance(leaf.value, torch.Tensor)]
    plain = (leaf.value.layout == torch.strided and not leaf.value.requires_grad for leaf in leaves)
    devices = {"cpu", *(leaf.value.device.type for leaf in leaves)}
    if not leaves or not all(plain) or not all(leaf.value.is_contiguous() for leaf in leaves):
        return None
    if any(torch.is_autocast_enabled(device) for device in devices):
        return None
    local = _Locals()
    conditions = [] if any(leaf.value.device.type == "cpu" for leaf in leaves) else ["not _autocast_enabled('cpu')"]
    for container in inputs.containers:
        if container.twin is None:
            conditions += _container_conditions(constant, container, local)
    tensors = {id(leaf.value): leaf for leaf in reversed(leaves)}  # the first place of each
    firsts = [leaf for leaf in leaves if tensors[id(leaf.value)] is leaf]
    sizes = [[None if i in leaf.dims else n for i, n in enumerate(leaf.value.shape)] for leaf in firsts]
    strides = [_contiguous_strides(one) for one in sizes]
    check = constant(tensor_check([leaf.value for leaf in firsts], sizes, strides))
    conditions.append(f"{check}({', '.join(local.assigned(leaf.code) for leaf in firsts)})")
    conditions += [f"not ({condition})" for condition in shared]
    conditions += [
        f"{local[leaf.code]}.is_contiguous()" for leaf, one in zip(firsts, strides, strict=True) if None in one
    ]
    seen: set[str] = set()
    for leaf in leaves:
        for index, dim in leaf.dims.items():
            size, name = f"{local[leaf.code]}.shape[{index}]", size_names[dim.name]
            known = dim.name in seen
            conditions.append(f"{size} == {name}" if known else f"{dim.min} <= ({name} := {size}) <= {dim.max}")
            seen.add(dim.name)
    aligned: dict[int, list[str]] = {}
    for leaf in firsts:
        if (alignment := required_alignment(leaf.value.element_size())) > 1:
            aligned.setdefault(alignment, []).append(f"{local[leaf.code]}.data_ptr()")
    conditions += [f"not ({' | '.join(pointers)}) % {alignment}" for alignment, pointers in aligned.items()]
    return " and ".join(conditions)


def _container_conditions(constant: Callable[[Any], str], container: Container, local: _Locals) -> list[str]:
    kind, keys = constant(container.kind), container.keys
    conditions = [f"_type({local.assigned(container.code)}) is {kind}"]
    if container.kind is dict:
        conditions.append(f"_list({local[container.code]}) == {constant(list(keys))}")  # type: ignore[arg-type]
    elif isinstance(keys, int) and keys >= 0:
        conditions.append(f"_len({local[container.code]}) == {keys}")
    return conditions


class _Locals:
    """Local variables for containers and tensors on the fast path, so that each is looked up once."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def __getitem__(self, code: str) -> str:
        """The expression, with the longest part of it that has a variable replaced by that."""
        end = len(code)
        while end > 0 and code[:end] not in self.names:
            end = max(code.rfind("[", 0, end), code.rfind(".", 0, end))
        return code if end <= 0 else self.names[code[:end]] + code[end:]

    def assigned(self, code: str) -> str:
        """The expression, which also sets a variable for later uses."""
        value = self[code]
        if code.isidentifier() or code in self.names:
            return value
        self.names[code] = f"_x{len(self.names)}"
        return f"({self.names[code]} := {value})"


def _contiguous_strides(sizes: list[int | None]) -> list[int | None]:
    """The strides of a contiguous tensor; None for those that a dynamic size is a factor of."""
    strides: list[int | None] = []
    step: int | None = 1
    for size in reversed(sizes):
        strides.append(step)
        step = None if step is None or size is None else step * max(size, 1)
    return strides[::-1]
