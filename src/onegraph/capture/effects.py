"""Effects on Python state: which of them a graph repeats as the module would, and the refusal of the others.

Takes what residual code writes and what the trace has read. A trace holds what it has read as constants, so a write
to such state makes it wrong at the next call. Where state is compared before each call, that is seen then.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import torch

from onegraph.capture.inputs import CallInputs
from onegraph.capture.roots import Scope, as_written, rooted_expression, scope_of
from onegraph.capture.state_check import evaluate
from onegraph.errors import CaptureError
from onegraph.ir.graph import WeightInput
from onegraph.ir.traced import GuardFact
from onegraph.torch_compat.dynamo import RawCapture
from onegraph.torch_compat.effects import Effect

_UNKNOWN = object()


def refuse_effects(
    raw: RawCapture,
    *,
    function: Any,
    owner: Any,
    inputs: CallInputs,
    weights: tuple[WeightInput, ...],
    state_is_checked: bool,
) -> None:
    """Raises CaptureError for an effect that the graph would get wrong at a later call.

    Those are writes to state that the trace has read, unless it is compared before each call (`state_is_checked`);
    and writes to a deque of limited length, which Dynamo takes for an unlimited one.
    """
    scope = scope_of(function, owner, inputs, raw.globals_read)
    where = f"{function.__module__}.{function.__qualname__}"
    for effect in raw.effects:
        value = _value(effect.source, scope)
        if effect.attribute is None and isinstance(value, collections.deque) and value.maxlen is not None:
            raise CaptureError(
                f"the module changes {as_written(effect.source, scope)}, a deque of limited length, and torch forgets "
                "the limit",
                where=where,
                hint="keep it in a list that the module cuts itself, or outside of the module",
            )
    if state_is_checked:
        return
    changed = [state.what for state in raw.changed_state]
    changed += [_what(effect, scope) for effect in raw.effects if _repeats_itself(effect, raw, scope, weights)]
    if changed:
        raise CaptureError(
            f"the module reads and changes Python state when it is called, and that isn't compared before each call: "
            f"{', '.join(dict.fromkeys(changed))}",
            where=where,
            hint="keep it in a tensor (register_buffer), pass it as an argument, or leave out freeze and own_module",
        )


def _what(effect: Effect, scope: Scope) -> str:
    shown = as_written(effect.source, scope)
    if effect.attribute == "cell_contents":
        return f"the closure variable {shown}"
    return f"the contents of {shown}" if effect.attribute is None else f"{shown}.{effect.attribute}"


def _value(source: str, scope: Scope) -> Any:
    """What stands at the source before the call; `_UNKNOWN` for an argument and what can't be read."""
    try:
        rooted = rooted_expression(source, scope)
        return _UNKNOWN if rooted is None else evaluate(*rooted)
    except Exception:  # noqa: BLE001 - a source that is no expression, or the user's attribute that raises
        return _UNKNOWN


def _is_of_an_argument(source: str, scope: Scope) -> bool:
    try:
        return rooted_expression(source, scope) is None
    except SyntaxError:
        return False


def _repeats_itself(effect: Effect, raw: RawCapture, scope: Scope, weights: tuple[WeightInput, ...]) -> bool:
    """Whether later calls would repeat what this call makes of what it has read."""
    if _is_of_an_argument(effect.source, scope):
        return False
    if effect.attribute == "cell_contents":
        return True
    holder = _value(effect.source, scope)
    if effect.attribute is None:
        tensors_alone = isinstance(holder, dict) and effect.source.endswith(("_buffers", "_buffers']"))
        return not tensors_alone or _is_stale(holder, _keys_read(effect.source, raw.guards), weights)
    place = f"{effect.source}.{effect.attribute}"
    if any(_is_read(fact, holder, effect, place, raw.sources, scope) for fact in raw.guards):
        return True
    value = getattr(holder, "__dict__", {}).get(effect.attribute)
    return isinstance(value, torch.Tensor) and _is_stale(vars(holder), [effect.attribute], weights)


def _keys_read(source: str, guards: tuple[GuardFact, ...]) -> Iterator[str]:
    for fact in guards:
        if fact.name.startswith(f"{source}['"):
            yield fact.name[len(source) + 2 :].partition("'")[0]


def _is_stale(holder: dict[str, Any], keys: Any, weights: tuple[WeightInput, ...]) -> bool:
    """Whether the graph has one of the values as a constant, and doesn't read it from `holder` on each call."""
    if any(not isinstance(holder.get(key), torch.Tensor) for key in keys):
        return True
    held = {id(value) for value in holder.values() if isinstance(value, torch.Tensor)}
    return any(id(w.holder[w.key]) in held and w.holder is not holder for w in weights)


def _is_read(fact: GuardFact, holder: Any, effect: Effect, place: str, inputs: tuple[str, ...], scope: Scope) -> bool:
    """Whether the fact is about the attribute that is written, at this place of its object or at another one."""
    attribute = effect.attribute
    if fact.keywords.get("attr") == attribute and _value(fact.name, scope) is holder:
        return True
    if fact.name.startswith((f"{place}.", f"{place}[")):
        return True
    base, _, name = fact.name.rpartition(".")
    if name != attribute or not base or (base != effect.source and _value(base, scope) is not holder):
        return False
    if isinstance(_value(fact.name, scope), torch.Tensor):  # told by where the graph takes it from
        return False
    return not (fact.kind == "TYPE_MATCH" and fact.name in inputs)
