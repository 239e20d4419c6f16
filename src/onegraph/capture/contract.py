"""The input contract: what every later call must have in common with the traced one, as straight-line Python.

Takes the leaves of the traced call and the strides that the graph has for them; gives the ledger's
entries and the source of an entry function with the module's own signature, which checks and then calls on.
"""

from __future__ import annotations

import builtins
import enum
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from onegraph.capture.fast_contract import fast_path
from onegraph.capture.inputs import KEYWORD_ARGUMENTS, POSITIONAL_ARGUMENTS, CallInputs, Container, Leaf, out_of_range
from onegraph.capture.regions import holds, predicate_code, predicate_functions
from onegraph.capture.sized_arguments import follows_another_size
from onegraph.capture.state_check import differs
from onegraph.errors import CaptureError, ConfigError, ConstraintError, InputContractError
from onegraph.ir.dims import DynamicDim
from onegraph.ir.ledger import InputEntry, StateRead

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_COMPARED = (enum.Enum, torch.Size, slice, range, frozenset, torch.layout, torch.memory_format)


_GENERATED_NAMES = re.compile(
    r"_[cnsx]\d+|_call\d+|_holds\d+|_break|_differs|_outside|_uncovered|_grad_enabled|_no_gradients|_autocast_enabled"
    r"|_autocast_dtype|_Tensor|_Parameter|_type|_list|_len|_isinstance|_id|_kept|_now|_bad|_changed|_[kov][0-9a-f]{6,}"
)
_FAST = """    try: _kept = {}
    except Exception: _kept = False
    if _kept:"""


@dataclass
class _Code:
    """The function under construction: its lines, and the objects that they name."""

    dims: list[str]
    lines: list[str] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)
    entries: list[InputEntry] = field(default_factory=list)
    sizes: dict[str, str] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    """The conditions that the fast path asks in the same words."""

    def constant(self, value: Any) -> str:
        name = f"_c{len(self.names)}"
        self.names[name] = value
        return name

    def check(self, condition: str, code: str, path: str, fact: str, expected: Any, *, shared: bool = False) -> None:
        """Adds: when `condition` is true, the argument breaks the contract."""
        if shared:
            self.shared.append(condition)
        entry = InputEntry(path, fact, str(expected))
        self.entries.append(entry)
        self.lines.append(f"    if {condition}: _break({self.constant(entry)}, {code})")


@dataclass(frozen=True)
class Contract:
    """`entries` for the ledger; `bind(calls)` gives the checking entry in front of the calls, each for a predicate.

    `lines` are the checks, and `names` the objects that they name.
    """

    entries: tuple[InputEntry, ...]
    lines: tuple[str, ...]
    names: Mapping[str, Any]
    bind: Callable[[Sequence[tuple[str | None, Callable[..., Any]]]], Callable[..., Any]]


def input_contract(
    inputs: CallInputs,
    strides: Mapping[str, tuple[str, ...]],
    required_alignment: Callable[[int], int],
    compared: Iterable[tuple[str, str]] = (),
    reads: Iterable[StateRead] = (),
) -> Contract:
    """Builds the contract. `strides` are as `sized_arguments.dynamic_strides` gives them, `compared` the sources
    of different tensors that the trace compared by identity, `reads` what else it read of the arguments.

    Raises CaptureError for strides that follow a size in a way that can't be told in the dims of the arguments before,
    and for an argument whose name the generated checks use.
    """
    for name in inputs.signature.traced.parameters:
        if _GENERATED_NAMES.fullmatch(name):
            raise CaptureError(f"an argument is named {name!r}, as the checks of the call are", hint="rename it")
    code = _Code([dim.name for dim in inputs.dims])
    _check_autocast(code, inputs)
    _check_containers(code, inputs.containers)
    first: dict[int, Leaf] = {}
    for leaf in inputs.leaves:
        if not isinstance(leaf.value, torch.Tensor):
            _check_constant(code, leaf)
            continue
        twin = first.setdefault(id(leaf.value), leaf)
        if twin is not leaf:
            expected = f"{twin.path} itself"
            code.check(f"{leaf.code} is not {twin.code}", leaf.code, leaf.path, "tensor", expected, shared=True)
        _check_tensor(code, leaf, strides.get(leaf.path), required_alignment)
    by_source = {source: leaf for leaf in inputs.leaves for source in (leaf.source, leaf.indexed_source)}
    for left, right in compared:
        one, other = by_source.get(left), by_source.get(right)
        if one is not None and other is not None:
            expected = f"another than {other.path}"
            code.check(f"{one.code} is {other.code}", one.code, one.path, "tensor", expected, shared=True)
    for read in reads:
        _check_read(code, read)
    parameters, call = _signature_code(inputs, code)
    lines, names = (f"def entry({parameters}): {call}", *code.lines), dict(code.names)
    fast = fast_path(inputs, code.constant, code.shared, code.sizes, required_alignment)
    return Contract(
        tuple(code.entries), lines, names, functools.partial(_entry, code, inputs.dims, fast, parameters, call)
    )


def _entry(
    code: _Code,
    dims: tuple[DynamicDim, ...],
    fast: str | None,
    parameters: str,
    call: str,
    calls: Sequence[tuple[str | None, Callable[..., Any]]],
) -> Callable[..., Any]:
    """The function `entry(parameters)` that checks, and calls the first of `calls` whose predicate holds."""
    sizes = [code.sizes.get(dim.name) for dim in dims]
    chosen = []
    for index, (predicate, _) in enumerate(calls):
        condition = ""
        if predicate is not None and re.search("[/%]|Mod|Div", predicate):  # by a size of 0, perhaps
            code.names[f"_holds{index}"] = holds(predicate, dims)
            condition = f"if _holds{index}(({', '.join(f'{size}' for size in sizes)},)): "
        elif predicate is not None:
            condition = f"if {predicate_code(predicate, dims, sizes)}: "
        chosen.append(f"    {condition}return _call{index}({call})")
    quick = [] if fast is None else [_FAST.format(fast), *(f"    {line}" for line in chosen)]
    refused = f"    _uncovered(({''.join(f'{size}, ' for size in sizes)}))"
    source = "\n".join([f"def entry({parameters}):", *quick, *code.lines, *chosen, refused])
    namespace = {
        **code.names,
        **{f"_call{index}": target for index, (_, target) in enumerate(calls)},
        **(predicate_functions() if any(predicate for predicate, _ in calls) else {}),
        **_CALLED,
        "_uncovered": functools.partial(_uncovered, dims),
    }
    exec(compile(source, "<onegraph input contract>", "exec"), namespace)  # noqa: S102 - our own text
    entry: Callable[..., Any] = namespace["entry"]
    return entry


def _check_autocast(code: _Code, inputs: CallInputs) -> None:
    for device in sorted({"cpu", *(x.value.device.type for x in inputs.leaves if isinstance(x.value, torch.Tensor))}):
        state = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        on = f"_autocast_enabled({device!r})"
        lost = f" or _autocast_dtype({device!r}) is not {code.constant(state[1])}" if state[0] else ""
        code.check(f"{on} is not {state[0]}{lost}", f"({on},)", f"autocast on {device}", "state", state)


def _check_read(code: _Code, read: StateRead) -> None:
    """What an expression over the arguments gives; one that raises gives something else."""
    entry = InputEntry(read.entry.what, "answer", read.entry.value)
    code.entries.append(entry)
    code.names.update(read.names)
    code.shared.append(read.condition.replace("{x}", read.expression))
    code.lines += [
        f"    try: _now = {read.expression}; _bad = {read.condition.replace('{x}', '_now')}",
        "    except Exception: _now, _bad = None, True",
        f"    if _bad: _changed({code.constant(entry)}, {code.constant(read.describe)}, _now)",
    ]


def _check_containers(code: _Code, containers: Sequence[Container]) -> None:
    """Each by itself, and that those which a module may change are as many objects as they were."""
    for container in containers:
        twin = container.twin
        if twin is None:
            _check_container(code, container)
        else:
            code.check(
                f"{container.code} is not {twin.code}", container.code, container.path, "object", twin.path, shared=True
            )
    mutable = [one for one in containers if one.is_mutable and one.twin is None]
    for index, one in enumerate(mutable[1:] if len(mutable) <= 4 else (), 1):
        for other in mutable[:index]:
            expected = f"another than {other.path}"
            code.check(f"{one.code} is {other.code}", one.code, one.path, "object", expected, shared=True)
    if len(mutable) > 4:
        ids = ", ".join(f"_id({one.code})" for one in mutable)
        paths = f"{mutable[0].path} … {mutable[-1].path}"
        code.check(
            f"_len({{{ids}}}) != {len(mutable)}", mutable[0].code, paths, "object", "another at each place", shared=True
        )


def _check_container(code: _Code, container: Container) -> None:
    kind = code.constant(container.kind)
    code.check(
        f"_type({container.code}) is not {kind}",
        container.code,
        container.path,
        "type",
        container.kind.__name__,
    )
    if container.kind is dict:
        keys = code.constant(list(container.keys))  # type: ignore[arg-type]
        code.check(f"_list({container.code}) != {keys}", container.code, container.path, "keys", container.keys)
    elif isinstance(container.keys, int) and container.keys >= 0:
        code.check(
            f"_len({container.code}) != {container.keys}",
            container.code,
            container.path,
            "length",
            container.keys,
        )


def _check_constant(code: _Code, leaf: Leaf) -> None:
    if isinstance(leaf.value, (*_CONSTANTS, *_COMPARED)):
        if leaf.value is None or isinstance(leaf.value, bool):
            code.check(f"{leaf.code} is not {leaf.value}", leaf.code, leaf.path, "value", leaf.value, shared=True)
            return
        value = code.constant(leaf.value)
        code.check(
            f"{leaf.code} is not {value} and _differs({leaf.code}, {value})",
            leaf.code,
            leaf.path,
            "value",
            leaf.value,
            shared=True,
        )
    else:
        kind = code.constant(type(leaf.value))
        code.check(
            f"_type({leaf.code}) is not {kind}", leaf.code, leaf.path, "type", type(leaf.value).__name__, shared=True
        )
        same = code.constant(leaf.value)
        expected = f"one {type(leaf.value).__name__}"
        code.check(f"{leaf.code} is not {same}", leaf.code, leaf.path, "object", expected, shared=True)


def _check_tensor(
    code: _Code, leaf: Leaf, strides: tuple[str, ...] | None, required_alignment: Callable[[int], int]
) -> None:
    value, at, path = leaf.value, leaf.code, leaf.path
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        code.check(f"_type({at}) is not _Tensor and _type({at}) is not _Parameter", at, path, "type", "Tensor")
        lazy = f"({value.is_neg()}, {value.is_conj()})"
        code.check(f"({at}.is_neg(), {at}.is_conj()) != {lazy}", at, path, "negative and conjugate bits", lazy)
    else:
        code.check(f"_type({at}) is not {code.constant(type(value))}", at, path, "type", type(value).__name__)
    layout = f"{at}.layout is not {code.constant(value.layout)} or {at}.is_nested is not {value.is_nested}"
    code.check(layout, at, path, "layout", value.layout)
    code.check(f"{at}.dtype is not {code.constant(value.dtype)}", at, path, "dtype", value.dtype)
    code.check(f"{at}.device != {code.constant(value.device)}", at, path, "device", value.device)
    code.check(f"{at}.dim() != {value.dim()}", at, path, "rank", value.dim())
    if value.dim():
        size = f"_s{len(code.lines)}"
        code.lines.append(f"    {size} = {at}.shape")
        for index, length in enumerate(value.shape):
            if index in leaf.dims:
                _check_dim(code, leaf.dims[index], f"{size}[{index}]", at, path, index)
            else:
                code.check(f"{size}[{index}] != {length}", at, path, f"size of dim {index}", length)
    if value.layout == torch.strided:
        _check_layout(code, leaf, strides, required_alignment)
    code.lines.append(f"    if {at}.requires_grad and _grad_enabled(): _no_gradients({path!r})")


def _check_dim(code: _Code, dim: DynamicDim, size: str, at: str, path: str, index: int) -> None:
    known = code.sizes.get(dim.name)
    if known is None:
        name = code.sizes[dim.name] = f"_n{len(code.sizes)}"
        code.lines.append(f"    {name} = {size}")
        code.lines.append(
            f"    if not {dim.min} <= {name} <= {dim.max}: _outside({code.constant(dim)}, {path!r}, {index}, {name})"
        )
    else:
        code.check(f"{size} != {known}", at, path, f"size of dim {index}", f"{dim.name}, as in {dim.inputs[0]}")


def _check_layout(
    code: _Code, leaf: Leaf, strides: tuple[str, ...] | None, required_alignment: Callable[[int], int]
) -> None:
    value, at, path = leaf.value, leaf.code, leaf.path
    if value.is_contiguous():
        code.check(f"not {at}.is_contiguous()", at, path, "strides", "contiguous")
    elif strides is not None:
        sizes = {code.dims.index(name): variable for name, variable in code.sizes.items()}
        steps = ", ".join(_stride_code(step, sizes, leaf) for step in strides)
        code.check(f"{at}.stride() != ({steps},) and {at}.numel()", at, path, "strides", f"({steps})")
    alignment = required_alignment(value.element_size())
    if alignment > 1:
        code.check(f"{at}.data_ptr() % {alignment}", at, path, "alignment in bytes", alignment)


def _stride_code(step: str, sizes: Mapping[int, str], leaf: Leaf) -> str:
    """The expression over the variables for the sizes of dims."""

    def variable(found: re.Match[str]) -> str:
        name = sizes.get(int(found[1]))
        if name is None:
            raise follows_another_size(leaf.path)
        return name

    return re.sub(r"\b_d(\d+)\b", variable, step)


def _signature_code(inputs: CallInputs, code: _Code) -> tuple[str, str]:
    """The parameters of the entry function, and the arguments with which it calls on, as source."""
    signature = inputs.signature.traced
    parameters: list[str] = []
    arguments: list[str] = []
    kinds = [p.kind for p in signature.parameters.values()]
    for index, parameter in enumerate(signature.parameters.values()):
        name = parameter.name
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in "".join(p[:1] for p in parameters):
            parameters.append("*")
        default = ""
        if parameter.default is not parameter.empty:
            default = f"={code.constant(parameter.default)}"
        if parameter.kind is parameter.VAR_POSITIONAL:
            parameters.append(f"*{name}")
            arguments.append(f"*{name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            parameters.append(f"**{name}")
            arguments.append(f"**{name}")
        else:
            parameters.append(f"{name}{default}")
            arguments.append(f"{name}={name}" if parameter.kind is parameter.KEYWORD_ONLY else name)
        if parameter.kind is parameter.POSITIONAL_ONLY and kinds[index + 1 : index + 2] != [parameter.POSITIONAL_ONLY]:
            parameters.append("/")
    return ", ".join(parameters), ", ".join(arguments)


def _break(entry: InputEntry, value: Any) -> None:
    if entry.fact in ("tensor", "object"):
        _refuse(entry, f"it was {entry.value} when the module was captured, and now it isn't")
    actual: Any = value
    if isinstance(value, torch.Tensor):
        plain = value.layout == torch.strided and not value.is_nested
        kind = f"{tuple(value.shape)} with strides {value.stride()}" if plain else f"of layout {value.layout}"
        actual = f"a {'nested ' if value.is_nested else ''}tensor {value.dtype} {kind} on {value.device}"
    elif entry.fact == "length":
        actual = f"one of length {len(value)}"
    elif entry.fact == "keys":
        actual = tuple(value)
    elif entry.fact in ("type", "value"):
        actual = f"{type(value).__name__} {value!r:.80}"
    _refuse(entry, f"its {entry.fact} was {entry.value} when the module was captured, and now it is given {actual}")


def _changed(entry: InputEntry, describe: Callable[[Any], str], now: Any) -> None:
    try:
        shown = describe(now)
    except Exception:  # noqa: BLE001 - of what the user's object gives now
        shown = "gone"
    _refuse(entry, f"it was {entry.value} when the module was captured, and now is {shown}")


def _refuse(entry: InputEntry, why: str) -> NoReturn:
    handed_on = entry.path in (POSITIONAL_ARGUMENTS, KEYWORD_ARGUMENTS)
    raise InputContractError(
        f"{entry.path} broke the input contract: {why}",
        where=f"argument {entry.path}",
        hint="give the same arguments by position and the same by name as in the first call: a decorator or hooks, "
        "which take *args and **kwargs, stand before forward"
        if handed_on
        else "declare sizes that change in dynamic_shapes, pass values that change as tensors, or compile once "
        "more for the other kind of call",
    )


def _uncovered(dims: tuple[DynamicDim, ...], sizes: tuple[int, ...]) -> None:
    told = ", ".join(f"{dim.name} = {size}" for dim, size in zip(dims, sizes, strict=True))
    raise ConstraintError(
        f"no artifact is right for the sizes {told}: the range was split by the model's own conditions, and a size "
        "like these wasn't among those that were tried",
        where=told,
        hint="compile once more for these sizes, or declare narrower Dims, all of whose sizes can be tried",
    )


def _outside(dim: DynamicDim, path: str, index: int, size: int) -> None:
    raise out_of_range(dim, path, index, size)


def _no_gradients(path: str) -> None:
    raise ConfigError(
        f"{path} requires a gradient, and onegraph compiles for inference only",
        where=f"argument {path}",
        hint="call under torch.no_grad() or torch.inference_mode(), or pass tensor.detach()",
    )


_CALLED = {
    "_break": _break,
    "_changed": _changed,
    "_differs": differs,
    "_outside": _outside,
    "_grad_enabled": torch.is_grad_enabled,
    "_no_gradients": _no_gradients,
    "_autocast_enabled": torch.is_autocast_enabled,
    "_autocast_dtype": torch.get_autocast_dtype,
    "_Tensor": torch.Tensor,
    "_Parameter": torch.nn.Parameter,
    **{f"_{name}": getattr(builtins, name) for name in ("type", "list", "len", "isinstance", "id")},
}
"""What the generated checks call, by the names that they have there."""
