"""Reads of state, made of what a trace's facts say: how each value is compared again, and told in words.

Takes a fact, the expression that reads its value, and the value. Gives a StateRead, or None where the fact says nothing
that could change.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from onegraph.capture.descriptions import described, has_a_name, number_of_hooks, short, type_name
from onegraph.capture.state_check import LITERALS, differs, evaluate
from onegraph.ir.graph import WeightInput
from onegraph.ir.ledger import StateEntry, StateRead
from onegraph.ir.traced import GuardFact
from onegraph.torch_compat.tensor_checks import KindCheck

# Guards on what the input contract or the ledger of shapes checks, or what the compiled code never does.
CHECKED_ELSEWHERE = frozenset(
    {
        "SHAPE_ENV",
        "GRAD_MODE",  # read by name where the user's code asks; the entry runs without gradients in any mode
        "AUTOGRAD_SAVED_TENSORS_HOOKS",  # inference saves nothing
        "GLOBAL_STATE",  # read by name, in GLOBAL_READS
        "DEFAULT_DEVICE",
        "DETERMINISTIC_ALGORITHMS",
        "TORCH_FUNCTION_STATE",
        "FSDP_TRAINING_STATE",
        "DUPLICATE_INPUT",  # `identities` has all of them
    }
)

_CONSTANT = re.compile(r"\$(\w+)")


def state_read(
    what: str,
    user: str | None,
    rooted: tuple[str, Mapping[str, Any]],
    condition: str,
    describe: Callable[[Any], str],
    **constants: Any,
) -> StateRead:
    """A read whose value now is the expected one.

    In `condition`, `{x}` is the value and `$name` a constant; `$object` is one that is compared by identity alone.
    """
    text, names = rooted
    variables = {name: f"_{'o' if name == 'object' else 'v'}{id(value):x}" for name, value in constants.items()}
    named = _CONSTANT.sub(lambda match: variables[match[1]], condition)
    value = evaluate(text, names)
    entry = StateEntry(what, describe(value), user=user, portable=describe is not described or has_a_name(value))
    return StateRead(
        entry, text, named, {**names, **{variables[name]: constants[name] for name in constants}}, describe
    )


def object_read(
    fact: GuardFact, rooted: tuple[str, dict[str, Any]], value: Any, by_tensor: Mapping[int, WeightInput], what: str
) -> StateRead | None:
    read = functools.partial(state_read, what, fact.user, rooted)
    if isinstance(value, torch.Tensor) and fact.kind not in ("HASATTR", "NOT_PRESENT_IN_GENERIC_DICT"):
        weight = by_tensor.get(id(value))
        if weight is None:
            return read("{x} is not $tensor or not $same(({x},))", described, tensor=value, same=KindCheck((value,)))
        return read(
            "{x} is not $holder[$key] or {x} is None",
            lambda now: weight.name if now is weight.holder[weight.key] else described(now),
            holder=weight.holder,
            key=weight.key,
        )
    return _value_read(fact, read, value)


def fact_read(fact: GuardFact, rooted: tuple[str, dict[str, Any]], value: Any, what: str) -> StateRead | None:
    """The read of one fact about an argument, where `value` stood; None for what is compared elsewhere.

    Of a tensor its class and its attributes are compared, not which one it is.
    """
    if fact.kind in CHECKED_ELSEWHERE or (
        isinstance(value, torch.Tensor) and fact.kind not in ("TYPE_MATCH", "HASATTR", "NOT_PRESENT_IN_GENERIC_DICT")
    ):
        return None
    return _value_read(fact, functools.partial(state_read, what, fact.user, rooted), value)


def _value_read(fact: GuardFact, read: Callable[..., StateRead], value: Any) -> StateRead | None:
    kind, attribute, key = fact.kind, fact.keywords.get("attr"), fact.keywords.get("key")
    if kind == "TYPE_MATCH":
        return read("$type({x}) is not $expected", type_name, type=type, expected=type(value))
    if kind == "HASATTR":
        has = hasattr(value, str(attribute))
        return read(
            f"$hasattr({{x}}, {attribute!r}) is not {has}",
            lambda now: f"{'with' if hasattr(now, str(attribute)) else 'without'} {attribute}",
            hasattr=hasattr,
        )
    if kind == "NOT_PRESENT_IN_GENERIC_DICT":
        return own_attribute_read(read, value, str(attribute))
    if kind in ("DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"):
        there = key in value
        return read(
            f"($key in {{x}}) is not {there}", lambda now: f"{'with' if key in now else 'without'} {key!r}", key=key
        )
    if kind == "EMPTY_NN_MODULE_HOOKS_DICT":
        return read("{x}", number_of_hooks)
    if kind in ("DICT_KEYS_MATCH", "MAPPING_KEYS_CHECK"):
        return read("$list({x}) != $keys", lambda now: short(f"keys {list(now)!r}"), list=list, keys=list(value))
    if kind == "SEQUENCE_LENGTH":
        return read(
            "$type({x}) is not $expected or $len({x}) != $length",
            lambda now: f"{type(now).__name__} of length {len(now)}",
            type=type,
            expected=type(value),
            len=len,
            length=len(value),
        )
    if kind in ("NOT_NONE_MATCH", "WEAKREF_ALIVE"):
        return read("{x} is None", lambda now: "None" if now is None else "not None")
    if isinstance(value, types.FunctionType):
        if kind == "CLOSURE_MATCH":  # its closure and defaults have reads of their own
            return read("{x}.__code__ is not $code", described, code=value.__code__)
        return read("{x} is not $function or {x}.__code__ is not $code", described, function=value, code=value.__code__)
    if value is None or isinstance(value, bool):
        return read(f"{{x}} is not {value}", described)
    if isinstance(value, set):
        return read("$differs([*{x}], $items)", described, differs=differs, items=[*value])
    if isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
        return read("$repr({x}.__reduce__()) != $state", described, repr=repr, state=repr(value.__reduce__()))
    if isinstance(value, tuple) and kind == "CONSTANT_MATCH":
        return read("$differs({x}, $value)", described, differs=differs, value=_copied(value))
    if isinstance(value, LITERALS) or kind in ("CONSTANT_MATCH", "EQUALS_MATCH", "CONSTANT_SUBCLASS_MATCH"):
        return read("{x} is not $value and $differs({x}, $value)", described, value=value, differs=differs)
    return read("{x} is not $object", described, object=value)


def _copied(value: Any) -> Any:
    """The value with the containers inside it copied, which may change."""
    if type(value) in (tuple, list, set):
        return type(value)(map(_copied, value))
    return {key: _copied(item) for key, item in value.items()} if type(value) is dict else value


def own_attribute_read(read: Callable[..., StateRead], value: Any, attribute: str) -> StateRead | None:
    """The class decides what `attribute` is, as long as the object has none of its own."""
    if not hasattr(value, "__dict__"):
        return None
    return read(
        f"{attribute!r} in {{x}}.__dict__",
        lambda now: f"{'with' if attribute in vars(now) else 'without'} {attribute} of its own",
    )
