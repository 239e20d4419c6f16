"""A trace as data that another process can take for its own: made by one, checked and bound by the other.

Takes the facts of a trace and what was made of them in this process. The record has no graph: what was compiled of
that lies elsewhere. Another process makes the same checks anew from the same facts, on its own objects; where any of
them comes out otherwise, the trace isn't for that process.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from onegraph.capture.captured_call import CapturedCall, captured_call
from onegraph.capture.inputs import read_call
from onegraph.capture.portable import NotPortableError, Texts, digest
from onegraph.capture.roots import scope_of
from onegraph.capture.signatures import call_signature, traced_function
from onegraph.capture.sized_arguments import other_strides
from onegraph.capture.weights import weight_places
from onegraph.errors import OnegraphError
from onegraph.ir.dims import DynamicDim, SizedArgument
from onegraph.ir.graph import CapturedGraph, WeightInput
from onegraph.ir.ledger import Ledger, LedgerCheck
from onegraph.ir.source_text import SourceFile
from onegraph.ir.traced import FoldedCall, Residual, TraceFacts
from onegraph.torch_compat.tensor_checks import tensor_facts

_UNNAMED_SCOPE = re.compile(r"G\['\w*_\d+_c[\w/]+'\]")
"""An object of one process that Dynamo put among the globals."""


class TraceDiffersError(Exception):
    """The trace isn't for this module or call; the message says which of its facts is another one.

    `num_held` is how many of the values that it read were found to be the same before; `checks` are those of all
    values, where it came to them.
    """

    def __init__(self, message: str, num_held: int = 0, checks: tuple[LedgerCheck, ...] = ()) -> None:
        super().__init__(message)
        self.num_held = num_held
        self.checks = checks


@dataclass(frozen=True)
class TraceRecord:
    """`reads` are the checks of Python's state: what is read, the value in words, and the digest of the whole check.

    `weights` are names and facts of the tensors that the graph takes first; `is_tensor` says of each further input
    whether it is one. `source_modules` are the modules whose files are the ledger's sources.
    """

    facts: TraceFacts
    residual: Residual
    strides: Mapping[str, tuple[str, ...]]
    sized: tuple[SizedArgument, ...]
    dims: tuple[DynamicDim, ...]
    weights: tuple[tuple[str, str], ...]
    input_names: tuple[str, ...]
    is_tensor: tuple[bool, ...]
    ledger: Ledger
    source_modules: tuple[str, ...]
    contract: str
    reads: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class RevivedTrace:
    """A recorded trace that was bound to this process's module: as much of a CapturedGraph as calls need."""

    weights: tuple[WeightInput, ...]
    call: CapturedCall


def record_trace(
    facts: TraceFacts,
    residual: Residual,
    strides: Mapping[str, tuple[str, ...]],
    call: CapturedCall,
    function: types.FunctionType,
    owner: Any,
    captured: CapturedGraph,
) -> TraceRecord:
    """The record of a trace. Raises NotPortableError where another process can't know that it is right there."""
    for reason in captured.ledger.unindexable:
        raise NotPortableError(reason)
    scope = next((fact.name for fact in facts.guards if _UNNAMED_SCOPE.search(fact.name)), None)
    if scope is not None:
        raise NotPortableError("it reads the globals of code that belongs to no module, as that of a namedtuple")
    if residual.foreign_closure or residual.missing(function):
        raise NotPortableError("the code that torch made for the function needs objects of this process alone")
    for weight in captured.weights:
        if weight.key == "":
            raise NotPortableError(f"the tensor {weight.name} stands in no place that has a name")
    texts = Texts(_roots(function, owner, captured.weights))
    inputs = captured.fake_inputs[len(captured.weights) :]
    return TraceRecord(
        facts=facts,
        residual=replace(residual, closure=None),  # the function has it
        strides=strides,
        sized=captured.sized,
        dims=captured.dims,
        weights=tuple(_weight_facts(captured.weights)),
        input_names=captured.input_names,
        is_tensor=tuple(isinstance(value, torch.Tensor) for value in inputs),
        ledger=captured.ledger,
        source_modules=tuple(map(_module_of, captured.ledger.sources)),
        contract=_contract_text(texts, call),
        reads=tuple(_reads(texts, call)),
    )


def revive_trace(
    record: TraceRecord,
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    dynamic_shapes: Any,
    max_size: int,
    required_alignment: Callable[[int], int],
) -> RevivedTrace:
    """The trace bound to the module, if tracing the call anew would give the same. Raises TraceDiffersError."""
    function, owner = traced_function(module)
    for source, name in zip(record.ledger.sources, record.source_modules, strict=True):
        if not replace(source, path=_file_of(name)).holds():
            raise TraceDiffersError(f"the source of {name} has changed")
    missing = record.residual.missing(function)
    if missing:
        raise TraceDiffersError(f"there is no global {missing[0]}")
    inputs = read_call(call_signature(module), args, kwargs, dynamic_shapes, max_size, sizing=None)
    if inputs.dims != record.dims:
        raise TraceDiffersError(_other_dims(record.dims, inputs.dims))
    places = weight_places(function, owner)
    if any(name not in places for name, _ in record.weights):
        raise TraceDiffersError("the module has other weights")
    weights = tuple(WeightInput(name, *places[name]) for name, _ in record.weights)
    for one, (name, facts) in zip(_weight_facts(weights), record.weights, strict=True):
        if one != (name, facts):
            raise TraceDiffersError(f"the weight {name} was {facts}, and is {one[1]}")
    try:
        call = captured_call(
            replace(record.facts, folded=tuple(map(_asked_again, record.facts.folded))),
            record.residual,
            record.strides,
            called=module,
            function=function,
            owner=owner,
            scope=scope_of(function, owner, inputs, function.__globals__),
            inputs=inputs,
            weights=weights,
            required_alignment=required_alignment,
        )
        texts = Texts(_roots(function, owner, weights))
        if _contract_text(texts, call) != record.contract:
            raise TraceDiffersError(_other_call(call, record))
        _compare(tuple(_reads(texts, call)), record.reads)
        differs = other_strides(inputs, record.strides)  # those in the contract are the trace's
        if differs is not None:
            raise TraceDiffersError(differs)
    except TraceDiffersError:
        raise
    except Exception as error:  # what was read isn't there, or is of another kind
        raise TraceDiffersError(_first_line(error)) from error
    return RevivedTrace(weights, call)


def first_other_weight(recorded: Sequence[tuple[str, str]], module: Any) -> str:
    """The first of a trace's weights, with their facts, that the module hasn't, or has of another kind, in words."""
    places = weight_places(*traced_function(module))
    for name, facts in recorded:
        if name not in places:
            return f"the module has no {name}"
        ((_, now),) = _weight_facts((WeightInput(name, *places[name]),))
        if now != facts:
            return f"{name} was {facts}, is {now}"
    return "the module has other tensors"


def _first_line(error: Exception) -> str:
    """The message, of another error than ours with its type."""
    text = str(error).partition("\n")[0]
    return text if isinstance(error, OnegraphError | NotPortableError) else f"{type(error).__name__}: {text}"


def _asked_again(folded: FoldedCall) -> FoldedCall:
    """With what the call gives in this process."""
    return replace(folded, result=folded.function(*folded.args, **folded.kwargs))


def _compare(now: tuple[tuple[str, str, str], ...], then: tuple[tuple[str, str, str], ...]) -> None:
    if now == then:
        return
    checks = tuple(
        LedgerCheck(name, before, value if what == name else None, (what, check) == (name, digested))
        for (what, value, check), (name, before, digested) in zip(now, then, strict=False)
    )
    same = sum(one == other for one, other in zip(now, then, strict=False))
    for one in checks:
        if not one.holds:
            told = f"{one.what} was {one.recorded}" + (
                f", and is {one.now}" if one.now not in (None, one.recorded) else ""
            )
            raise TraceDiffersError(told, same, checks)
    raise TraceDiffersError(f"{len(now)} values are read, and {len(then)} were", same, checks)


def _other_dims(was: tuple[DynamicDim, ...], now: tuple[DynamicDim, ...]) -> str:
    """The declared ranges that differ, in words."""
    before, after = ({dim.name: f"{dim.min}..{dim.max}" for dim in dims} for dims in (was, now))
    told = [
        f"{name} was {before.get(name, 'not declared')}, and is {after.get(name, 'not declared')}"
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    ]
    return f"declared sizes differ: {'; '.join(told)}" if told else "other dims are declared"


def _other_call(call: CapturedCall, record: TraceRecord) -> str:
    for one, other in zip(call.contract.entries, record.ledger.inputs, strict=False):
        if one != other:
            now = one.value if (one.path, one.fact) == (other.path, other.fact) else "gone"
            return f"{other.path}: its {other.fact} was {other.value}, and is {now}"
    return "the call has other arguments"


def _weight_facts(weights: tuple[WeightInput, ...]) -> list[tuple[str, str]]:
    return [(weight.name, str(tensor_facts(weight.holder[weight.key]))) for weight in weights]


def _contract_text(texts: Texts, call: CapturedCall) -> str:
    return digest(texts.lines(call.contract.lines, call.contract.names))


def _reads(texts: Texts, call: CapturedCall) -> list[tuple[str, str, str]]:
    return [(read.entry.what, read.entry.value, digest(texts.read(read))) for read in call.state]


def _roots(function: types.FunctionType, owner: Any, weights: tuple[WeightInput, ...]) -> dict[int, str]:
    """The objects from which reads begin."""
    roots = {id(weight.holder): f"the holder of {weight.name}" for weight in reversed(weights)}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    roots |= {id(cell): f"the variable {name}" for name, cell in cells}
    roots[id(function.__globals__)] = "the function's globals"
    return roots if owner is None else {**roots, id(owner): "self"}


def _module_of(source: SourceFile) -> str:
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) == source.path:
            return name
    raise NotPortableError(f"{source.path} is no module's file")


def _file_of(name: str) -> str:
    """Where the module's source lies in this process; empty if it has none."""
    module = sys.modules.get(name)
    if module is None:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return ""
        return (spec.origin if spec is not None else None) or ""
    return getattr(module, "__file__", None) or ""
