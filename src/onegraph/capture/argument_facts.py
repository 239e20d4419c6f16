"""What a trace read of its arguments beside the leaves: attributes of objects and of tensors, and their absence.

Takes the facts of a trace, and the arguments as they were given and as they were traced. Gives reads over the
names of the arguments, for the input contract.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from onegraph.capture.inputs import CallInputs
from onegraph.capture.roots import Scope, argument_expression, as_written
from onegraph.capture.state_check import evaluate, state_check
from onegraph.capture.value_reads import fact_read
from onegraph.errors import CaptureError
from onegraph.ir.ledger import StateRead
from onegraph.ir.traced import GuardFact

_BY_LEAVES = frozenset({"TENSOR_MATCH", "ID_MATCH", "TYPE_MATCH"})
_BY_CONTAINERS = frozenset({"TYPE_MATCH", "SEQUENCE_LENGTH", "DICT_KEYS_MATCH", "MAPPING_KEYS_CHECK", "ID_MATCH"})
"""What the contract compares itself; for identities there is an error."""


def argument_reads(
    facts: Iterable[GuardFact], asked: Iterable[GuardFact], inputs: CallInputs, scope: Scope
) -> tuple[StateRead, ...]:
    """A read for each fact about an argument that its leaves and containers don't tell, and for what was `asked`.

    Raises CaptureError where the call's own answer isn't the one in the trace: tensors are traced as plain ones that
    require no gradient.
    """
    reads: dict[tuple[str, str], StateRead] = {}
    for fact in [*_beside_leaves(facts, inputs), *asked]:
        expression = argument_expression(fact.name, scope, inputs.given)
        if expression is None:
            continue
        text, names = expression
        traced = {**names, **inputs.traced}
        shown = as_written(fact.name, scope)
        read = fact_read(fact, (text, traced), _traced_value(fact, text, traced, shown), shown)
        if read is None or (read.expression, read.condition) in reads:
            continue
        read = replace(read, names={name: one for name, one in read.names.items() if name not in inputs.given})
        if not state_check((replace(read, names={**read.names, **inputs.given}),))():
            now = read.describe(evaluate(text, {**names, **inputs.given}))
            raise CaptureError(
                f"the module asks about {shown}: {now} in this call, and {read.entry.value} in its trace, where "
                "tensors are plain ones without gradients",
                where=fact.user,
                hint="pass tensor.detach(), or ask outside of the module and pass the answer as an argument",
            )
        reads[read.expression, read.condition] = read
    return tuple(reads.values())


def _beside_leaves(facts: Iterable[GuardFact], inputs: CallInputs) -> Iterator[GuardFact]:
    leaves = {source: leaf for leaf in inputs.leaves for source in (leaf.source, leaf.indexed_source)}
    containers = {container.source for container in inputs.containers}
    for fact in facts:
        leaf = leaves.get(fact.name)
        if leaf is not None and (fact.kind in _BY_LEAVES or not isinstance(leaf.value, torch.Tensor)):
            continue
        if fact.name in containers and fact.kind in _BY_CONTAINERS:
            continue
        if fact.name and fact.kind not in ("TENSOR_MATCH", "ID_MATCH"):
            yield fact


def _traced_value(fact: GuardFact, text: str, names: dict[str, Any], shown: str) -> Any:
    try:
        return evaluate(text, names)
    except Exception as error:
        raise CaptureError(
            f"{shown} was read while tracing, and can't be read again: {error!r}",
            where=fact.user,
            hint="keep such a value in a field of the argument, or pass it as an argument of its own",
        ) from error
