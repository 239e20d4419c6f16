"""What a capture knows of calls: the checks in front of them, what they read of Python's state, and their Python part.

Takes the facts of a trace and a call like the one that was traced, in this process; gives the same whether the trace
was made here or by another process.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from onegraph.capture.argument_facts import argument_reads
from onegraph.capture.contract import Contract, input_contract
from onegraph.capture.inputs import CallInputs
from onegraph.capture.roots import Scope
from onegraph.capture.state import state_reads
from onegraph.ir.graph import WeightInput
from onegraph.ir.ledger import StateRead
from onegraph.ir.traced import Residual, TraceFacts
from onegraph.torch_compat import residual_calls


@dataclass(frozen=True)
class CapturedCall:
    """`make_callable` is as for CapturedGraph."""

    contract: Contract
    state: tuple[StateRead, ...]
    make_callable: Callable[[Callable[..., Any]], Callable[..., Any]]


def captured_call(
    traced: TraceFacts,
    residual: Residual,
    strides: Mapping[str, tuple[str, ...]],
    *,
    called: Any,
    function: types.FunctionType,
    owner: Any,
    scope: Scope,
    inputs: CallInputs,
    weights: tuple[WeightInput, ...],
    required_alignment: Callable[[int], int],
) -> CapturedCall:
    """`called` is what the user calls, `function` what of it was traced, and `owner` the `self` of that, or None.

    Raises CaptureError for what can't be checked again.
    """
    compared = [(pair.left, pair.right) for pair in traced.compared]
    reads = argument_reads(traced.guards, traced.asked, inputs, scope)
    contract = input_contract(inputs, strides, required_alignment, compared, reads)
    state = state_reads(
        traced, called=called, function=function, owner=owner, scope=scope, inputs=inputs, weights=weights
    )
    residual_self = () if owner is None else (owner,)

    def make_callable(run: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(residual.bind(function, run, residual_calls.module), *residual_self)

    return CapturedCall(contract, state, make_callable)
