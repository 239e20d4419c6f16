"""The fast path of the input contract: one condition that only calls which keep the contract fulfil."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from onegraph.capture.inputs import CallInputs, Container, Leaf
from onegraph.ir.dims import DynamicDim
from onegraph.torch_compat.tensor_checks import dispatch_state, tensor_check

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_KEPT_CHECKS = 4096
"""So many combinations of sizes keep their check; past that all are made anew."""


def fast_path(
    inputs: CallInputs,
    constant: Callable[[Any], str],
    shared: Sequence[str],
    size_names: Mapping[str, str],
    required_alignment: Callable[[int], int],
) -> str | None:
    """A condition that is true only for calls that keep the contract, with the tensors compared by one C++ call.

    None where there is no such condition. A call that it refuses, by a false value or by raising, is judged by the
    checks, which say what is wrong; so it may refuse too much, and never too little. Autocast is among the dispatch
    keys that C++ compares.

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
    if any(type(leaf.value) not in _PLAIN or leaf.value.is_conj() or leaf.value.is_neg() for leaf in leaves):
        return None
    local = _Locals()
    conditions = [] if any(leaf.value.device.type == "cpu" for leaf in leaves) else ["not _autocast_enabled('cpu')"]
    for container in inputs.containers:
        if container.twin is None:
            conditions += _container_conditions(constant, container, local)
    tensors = {id(leaf.value): leaf for leaf in reversed(leaves)}  # the first place of each
    firsts = [leaf for leaf in leaves if tensors[id(leaf.value)] is leaf]
    measured = {dim.name: leaf for leaf in reversed(firsts) for dim in leaf.dims.values()}  # the first of each dim
    asked = {leaf.path for leaf in measured.values()}
    for leaf in firsts:  # C++ ends the process for a nested tensor; one that is asked for its shape raises
        if leaf.path not in asked:
            conditions.append(f"not {local.assigned(leaf.code)}.is_nested")
    sizes = _sizes(measured, size_names, local)
    check = constant(_CheckBySizes(firsts, tuple(sizes), inputs.dims))
    tensors_given = ", ".join(local.assigned(leaf.code) for leaf in firsts)
    conditions.append(f"{check}[{', '.join(sizes.values()) or '()'}]({tensors_given})")
    conditions += [f"not ({condition})" for condition in shared]
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


def _sizes(measured: Mapping[str, Leaf], size_names: Mapping[str, str], local: _Locals) -> dict[str, str]:
    """Dim -> an expression that reads its size off the first tensor with it, and sets the variable for it."""
    found: dict[str, str] = {}
    for name, leaf in measured.items():
        index = next(i for i, dim in leaf.dims.items() if dim.name == name)
        found[name] = f"({size_names[name]} := {local.assigned(leaf.code)}.shape[{index}])"
    return found


class _CheckBySizes(dict[Any, Callable[..., bool]]):
    """Sizes of the dims (a number, or a tuple for several) -> the check of all tensors at these sizes."""

    def __init__(self, leaves: Sequence[Leaf], names: tuple[str, ...], dims: Sequence[DynamicDim]) -> None:
        by_name = {dim.name: dim for dim in dims}
        self.dims = [by_name[name] for name in names]
        self.shapes = [
            [leaf.dims[i].name if i in leaf.dims else size for i, size in enumerate(leaf.value.shape)]
            for leaf in leaves
        ]
        self.examples = [_stand_in(leaf.value) for leaf in leaves]
        self.state = dispatch_state()  # of the captured call; a check is made in a later one, under autocast perhaps

    def __missing__(self, sizes: int | tuple[int, ...]) -> Callable[..., bool]:
        given = sizes if isinstance(sizes, tuple) else (sizes,)
        if any(not dim.min <= size <= dim.max for dim, size in zip(self.dims, given, strict=True)):
            return _refuse
        by_name = {dim.name: size for dim, size in zip(self.dims, given, strict=True)}
        shapes = [[by_name[size] if isinstance(size, str) else size for size in shape] for shape in self.shapes]
        if len(self) >= _KEPT_CHECKS:
            self.clear()
        strides = [_contiguous_strides(shape) for shape in shapes]
        check = self[sizes] = tensor_check(self.examples, shapes, strides, self.state)
        return check


def _refuse(*tensors: Any) -> bool:
    return False


def _stand_in(value: torch.Tensor) -> torch.Tensor:
    """A tensor of no memory, with the class, dtype, device, rank and dispatch keys of `value`."""
    with torch.inference_mode(value.is_inference()):
        empty = torch.empty([0] * value.dim(), dtype=value.dtype, device=value.device)
        return torch.nn.Parameter(empty, requires_grad=False) if type(value) is torch.nn.Parameter else empty


def _contiguous_strides(sizes: Sequence[int]) -> list[int]:
    strides: list[int] = []
    step = 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]
