"""The ledger of Python state: every value that a trace read from outside its arguments, and its check.

Takes Dynamo's guards, the traced function and its `self`, and the weights of the graph. Gives one
StateRead for each: a ledger entry, and how to compare what stands there now with what stood there right after
tracing. `state_check` makes one function of them.
"""

from __future__ import annotations

import enum
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from onegraph.capture.descriptions import described, has_a_name, number_of_hooks, one_object, type_name
from onegraph.capture.inputs import CallInputs
from onegraph.capture.roots import Scope, as_written, root, rooted_expression
from onegraph.capture.signatures import forward_of
from onegraph.capture.state_check import LITERALS, differs, evaluate
from onegraph.capture.value_reads import CHECKED_ELSEWHERE, object_read, own_attribute_read, state_read
from onegraph.env import process_variables
from onegraph.errors import CaptureError
from onegraph.ir.graph import WeightInput
from onegraph.ir.ledger import CheckedWhen, StateEntry, StateRead
from onegraph.ir.source_text import code_digest
from onegraph.ir.traced import FoldedCall, GuardFact, Places, TraceFacts, UsedBuiltin
from onegraph.torch_compat.torch_state import GLOBAL_READS

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_IS_HEAP_TYPE = 1 << 9
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)

_BUILTIN = (dict, list, tuple)


def state_reads(
    traced: TraceFacts,
    *,
    called: Any,
    function: Any,
    owner: Any,
    scope: Scope,
    inputs: CallInputs,
    weights: tuple[WeightInput, ...],
) -> tuple[StateRead, ...]:
    """One read for each fact of the trace that isn't about an argument, in a stable order.

    Every object that was read must be the same object again: a trace has answers to `a is b` in it, and the order
    of writes to objects that are two. But for those at an attribute that residual code sets, which calls replace.

    `called` is what the user calls, `function` is what of it was traced, and `owner` the `self` of that, or None.

    Raises CaptureError for a value that the trace read and that can't be read again, and for an argument that was
    compared with a tensor of the module.
    """
    kinds = [one.kind for one in inputs.containers if one.kind not in _BUILTIN]
    facts = _FactReader(traced, scope, weights, kinds if owner is None else [*kinds, type(owner)])
    for fact in _with_other_places(traced.guards, traced.same):
        facts.read(fact)
    reads = facts.reads
    reads += _compared_reads(traced.compared, scope)
    reads += facts.objects.replaced()
    reads += _method_reads(facts.classes.values(), traced.functions)
    reads += _function_reads(function.__qualname__, function, root(function))
    if isinstance(owner, torch.nn.Module):
        reads += _owner_reads(owner)
    if isinstance(called, torch.nn.Module) and function is forward_of(called):
        reads += _forward_reads(called, owner, function)
    reads += _environment_reads(traced.environment_user or facts.environment_user)
    reads += map(_builtin_read, traced.builtins)
    reads += _global_reads(reads_grad_mode(traced.guards))
    reads += map(_fold_read, traced.folded)
    return _distinct(reads)


class _FactReader:
    """Reads what facts are about, one after the other.

    `classes` are those of all objects met, whose methods the trace may have called; `environment_user` is the user's
    line that read the process's variables.
    """

    def __init__(self, traced: TraceFacts, scope: Scope, weights: tuple[WeightInput, ...], classes: list[type]) -> None:
        self.scope = scope
        self.by_tensor = {id(weight.holder[weight.key]): weight for weight in weights}
        self.counters = traced.counted.intersection(traced.sources)
        self.asks_for_gradients = traced.asks_for_gradients
        self.objects = _Objects(traced.stored_attributes)
        self.classes: dict[int, type] = {id(one): one for one in classes}
        self.environment_user: str | None = None
        self.reads: list[StateRead] = []

    def read(self, fact: GuardFact) -> None:
        """Adds the reads for a fact. Raises CaptureError."""
        expression = rooted_expression(fact.name, self.scope)
        if expression is None:
            self._refuse_identity_of_argument(fact)
            return
        shown = as_written(fact.name, self.scope)
        try:
            value = evaluate(expression[0], expression[1])
        except Exception as error:
            raise CaptureError(
                f"{shown} was read while tracing, and can't be read again: {error!r}",
                where=fact.user,
                hint="keep such a value in a plain attribute, or pass it as an argument",
            ) from error
        if value is process_variables():
            self.environment_user = self.environment_user or fact.user
        pinned = self.objects.add(expression, value, shown, fact.user)
        self.reads += [pinned] if pinned is not None else []
        known = pinned is not None or expression[0] in self.objects.volatile
        told = (fact.kind == "SAME" and known) or (fact.kind == "TYPE_MATCH" and pinned is not None)
        if isinstance(value, torch.Tensor) or not told:
            read = object_read(fact, expression, value, self.by_tensor, shown)
            self.reads += [read] if read is not None else []
        if fact.name in self.counters:  # an input, of which torch assumes that it isn't negative
            sign = state_read(
                f"the sign of {shown}", fact.user, expression, "{x} < 0", lambda now: "< 0" if now < 0 else ">= 0"
            )
            self.reads.append(sign)
        if isinstance(value, torch.Tensor) and self.asks_for_gradients:
            flag, is_not = (f"{expression[0]}.requires_grad", expression[1]), f"{{x}} is not {value.requires_grad}"
            self.reads.append(state_read(f"{shown}.requires_grad", fact.user, flag, is_not, described))
        self._note_class(fact, value)

    def _refuse_identity_of_argument(self, fact: GuardFact) -> None:
        if fact.kind == "ID_MATCH":
            raise CaptureError(
                f"the module asks for id({as_written(fact.name, self.scope)}), and that is an argument",
                where=fact.user,
                hint="compare tensors with `is`, or ask outside of the module and pass the answer as an argument",
            )

    def _note_class(self, fact: GuardFact, value: Any) -> None:
        if fact.kind == "TYPE_MATCH" and type(value) not in _BUILTIN:
            self.classes[id(type(value))] = type(value)
        elif isinstance(value, type):
            self.classes[id(value)] = value
        elif not isinstance(value, torch.Tensor) and type(value).__flags__ & _IS_HEAP_TYPE:
            self.classes[id(type(value))] = type(value)


def _with_other_places(facts: Iterable[GuardFact], same: Iterable[Places]) -> Iterator[GuardFact]:
    """The facts about state, and of the kind SAME that an object which was read stands at each of its places."""
    for fact in facts:
        if fact.name and fact.kind not in CHECKED_ELSEWHERE:
            yield fact
    for pair in same:
        yield GuardFact(pair.left, "SAME", pair.user, {})
        yield GuardFact(pair.right, "SAME", pair.user, {})


def _compared_reads(compared: Iterable[Places], scope: Scope) -> Iterator[StateRead]:
    """Two tensors of the module that the trace compared; those of the call are the input contract's."""
    for pair in compared:
        roots = rooted_expression(pair.left, scope), rooted_expression(pair.right, scope)
        if roots[0] is not None and roots[1] is not None:
            both = f"({roots[0][0]}, {roots[1][0]})", {**roots[0][1], **roots[1][1]}
            what = f"{as_written(pair.left, scope)} is {as_written(pair.right, scope)}"
            condition = f"({{x}}[0] is {{x}}[1]) is not {_are_same(evaluate(*both))}"
            yield state_read(what, pair.user, both, condition, _are_same)
        elif roots[0] is not None or roots[1] is not None:
            left, right = as_written(pair.left, scope), as_written(pair.right, scope)
            raise CaptureError(
                f"the module asks whether {left} and {right} are the same tensor, and one of them is an argument",
                where=pair.user,
                hint="ask it outside of the module, and pass the answer as an argument",
            )


_WITHOUT_IDENTITY = (
    torch.Tensor,  # has reads of its own, and may be replaced
    *LITERALS,
    tuple,
    frozenset,
    range,
    slice,
    type,
    enum.Enum,
    types.CodeType,
    types.ModuleType,
    types.MethodType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.layout,
)
"""Values that are compared otherwise, or that a program doesn't tell from their equals."""


class _Pinned(dict[int, tuple[Any, str]]):
    """Objects by their ids, each with the first place where it stands."""


class _Objects:
    """Which object stands at which place: pinned where it stays, else told from all others."""

    def __init__(self, stored_attributes: frozenset[str]) -> None:
        self.stored = stored_attributes
        self.pinned = _Pinned()
        self.volatile: dict[str, tuple[Any, Mapping[str, Any], str, str | None]] = {}

    def add(self, rooted: tuple[str, Mapping[str, Any]], value: Any, what: str, user: str | None) -> StateRead | None:
        """The read that pins the object, or None for a value without identity and for one that calls replace."""
        text, names = rooted
        if isinstance(value, _WITHOUT_IDENTITY) or evaluate(text, names) is not value:
            return None
        if text.rpartition(".")[2] in self.stored:
            self.volatile[text] = value, names, what, user
            return None
        return self.pin(rooted, value, what, user)

    def pin(self, rooted: tuple[str, Mapping[str, Any]], value: Any, what: str, user: str | None) -> StateRead:
        _, first_place = self.pinned.setdefault(id(value), (value, what))
        words = one_object(value, first_place if first_place != what else None)
        condition = "{x} is not $object"
        if type(value).__flags__ & _IS_HEAP_TYPE:  # whose __class__ may be assigned
            return state_read(
                what,
                user,
                rooted,
                f"{condition} or {{x}}.__class__ is not $cls",
                words,
                object=value,
                cls=type(value),
            )
        return state_read(what, user, rooted, condition, words, object=value)

    def replaced(self) -> Iterator[StateRead]:
        """For each object that calls replace: it is none of the pinned, and each other one is or isn't the same."""
        volatile = [*self.volatile.items()]
        for index, (text, (value, names, what, user)) in enumerate(volatile):
            if id(value) in self.pinned:
                yield self.pin((text, names), value, what, user)
            else:
                yield state_read(what, user, (text, names), "$id({x}) in $pinned", type_name, id=id, pinned=self.pinned)
            for other, (other_value, other_names, other_what, _) in volatile[:index]:
                both = f"({text}, {other})", {**names, **other_names}
                same = value is other_value
                condition = f"({{x}}[0] is {{x}}[1]) is not {same}"
                yield state_read(f"{what} is {other_what}", user, both, condition, _are_same)


def _are_same(pair: tuple[Any, Any]) -> str:
    return str(pair[0] is pair[1])


def _method_reads(classes: Iterable[type], traced: frozenset[tuple[str, str]]) -> Iterator[StateRead]:
    """Methods that were inlined, where the class finds them, and that no further attribute hides or adds any."""
    names = {name for name, _ in traced}

    def is_traced(code: types.CodeType) -> bool:
        return code.co_qualname in names and (code.co_qualname, code_digest(code)) in traced

    for cls in classes:
        text, roots = root(cls)
        for base in cls.__mro__:
            for name, raw in sorted(vars(base).items()):
                inner = next((part for part in _INNER if isinstance(raw, part)), None)
                method = getattr(raw, _INNER[inner], None) if inner is not None else raw
                if not isinstance(method, types.FunctionType) or not is_traced(method.__code__):
                    continue
                found = inspect.getattr_static(cls, name) is raw
                place = text if found else f"_k{id(base):x}"
                expression = f"{place}.{name}" + (f".{_INNER[inner]}" if inner not in (None, staticmethod) else "")
                rooted = expression, roots if found else {place: base}
                yield from _function_reads(f"{cls.__qualname__}.{name}", method, rooted)
            if base.__module__.partition(".")[0] not in ("builtins", "torch"):
                yield _size_read(base)


_INNER: dict[type, str] = {classmethod: "__func__", staticmethod: "__func__", property: "fget"}
"""Where a descriptor keeps the function that is inlined."""


def _size_read(cls: type) -> StateRead:
    """A further attribute may answer what tracing asked in vain, as `__len__` does for `if object:`."""
    text, names = root(cls)
    return state_read(
        f"{cls.__qualname__}.__dict__",
        None,
        (f"{text}.__dict__", names),
        f"$len({{x}}) != {len(vars(cls))}",
        lambda now: f"{len(now)} attributes",
        len=len,
    )


def _function_reads(
    what: str, function: types.FunctionType, rooted: tuple[str, Mapping[str, Any]]
) -> Iterator[StateRead]:
    """The code that was inlined, and what its call adds to it: defaults, and the variables of its closure."""
    code = function.__code__
    text, names = rooted
    read = functools.partial(state_read, user=f"{code.co_filename}:{code.co_firstlineno}")
    yield read(what, rooted=rooted, condition="{x}.__code__ is not $code", describe=described, code=code)
    for attribute in ("__defaults__", "__kwdefaults__", "__closure__"):
        value = getattr(function, attribute)
        if value:
            yield read(
                f"{what}.{attribute}",
                rooted=(f"{text}.{attribute}", names),
                condition="{x} is not $value and {x} != $value",
                describe=_words_of(value),
                value=dict(value) if isinstance(value, dict) else value,
            )


def _words_of(value: Any) -> Callable[[Any], str]:
    return lambda now: type_name(now) if now is value else f"another {type_name(now)}"


def _builtin_read(used: UsedBuiltin) -> StateRead:
    """A global of the same name would hide the builtin."""
    return state_read(
        used.name,
        used.user,
        root(used.globals_read),
        f"{used.name!r} in {{x}}",
        lambda now: "a global" if used.name in now else "the builtin",
    )


def _owner_reads(owner: torch.nn.Module) -> Iterator[StateRead]:
    """What `module(...)` would do beside its forward, and which forward it has."""
    text, names = root(owner)
    yield state_read("self.training", None, (f"{text}.training", names), f"{{x}} is not {owner.training}", described)
    for hooks in _HOOKS:
        if not getattr(owner, hooks):
            yield state_read(f"self.{hooks}", None, (f"{text}.{hooks}", names), "{x}", number_of_hooks)
    if "forward" not in vars(owner):
        own = own_attribute_read(functools.partial(state_read, "self", None, (text, names)), owner, "forward")
        if own is not None:
            yield own
    text, names = root(torch.nn.modules.module)
    for hooks in _GLOBAL_HOOKS:
        if not getattr(torch.nn.modules.module, hooks):
            what = f"torch.nn.modules.module.{hooks}"
            yield state_read(what, None, (f"{text}.{hooks}", names), "{x}", number_of_hooks)


def _forward_reads(module: torch.nn.Module, owner: Any, function: Any) -> Iterator[StateRead]:
    """That the module's forward is still this function, where it isn't a method that its class gives it."""
    if owner is not module or "forward" in vars(module):
        (reader, reader_names), (text, names) = root(forward_of), root(module)
        rooted = f"{reader}({text})", {**reader_names, **names}
        yield state_read("forward", None, rooted, "{x} is not $function", described, function=function)


def _environment_reads(user: str | None) -> Iterator[StateRead]:
    """The whole environment, if traced code names it: Dynamo guards neither a missing variable nor `os.getenv`.

    `user` is where it was read, None where it wasn't.
    """
    if user is None:
        return
    variables = process_variables()
    before = dict(variables)

    def described(now: Mapping[str, str]) -> str:
        changed = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
        return f"other values of {', '.join(changed)}" if changed else f"{len(before)} variables"

    raw = {**variables._data}  # type: ignore[attr-defined]
    text, names = root(variables)
    condition = "{x}._data != $raw"
    yield state_read("os.environ", user, (text, names), condition, described, raw=raw)


def reads_grad_mode(facts: Iterable[GuardFact]) -> bool:
    """Whether the user's code asks for the grad mode. It runs without gradients, but it may look."""
    return any(fact.kind == "GRAD_MODE" and fact.user is not None for fact in facts)


def _global_reads(grad_mode: bool) -> Iterator[StateRead]:
    getters = {**GLOBAL_READS, **({"torch.is_grad_enabled()": torch.is_grad_enabled} if grad_mode else {})}
    for what, getter in getters.items():
        text, names = root(getter)
        yield state_read(what, None, (f"{text}()", names), "{x} != $value", described, value=getter())


def _fold_read(folded: FoldedCall) -> StateRead:
    """A call that was run while tracing, and its result: compared with what the same call gives now.

    What the user declared constant, and what is installed, is asked again by another process alone.
    """
    function, names = root(folded.function)
    arguments = [root(value) for value in folded.args]
    named = {key: root(value) for key, value in folded.kwargs.items()}
    for _, constants in (*arguments, *named.values()):
        names.update(constants)
    passed = [text for text, _ in arguments] + [f"{key}={text}" for key, (text, _) in named.items()]
    shown = [f"{value!r:.40}" for value in folded.args] + [f"{k}={v!r:.40}" for k, v in folded.kwargs.items()]
    called = described(folded.function).partition(",")[0]
    known = all(map(has_a_name, (folded.function, folded.result, *folded.args, *folded.kwargs.values())))
    when: CheckedWhen = "call" if folded.kind == "state" else "load" if known else "never"
    value = folded.result
    return StateRead(
        StateEntry(f"{called}({', '.join(shown)})", described(value), when, folded.user, portable=known),
        f"{function}({', '.join(passed)})",
        f"_differs({{x}}, _v{id(value):x})",
        {**names, "_differs": differs, f"_v{id(value):x}": value},
        described,
    )


def _distinct(reads: Iterable[StateRead]) -> tuple[StateRead, ...]:
    """Each check once, under its first user line; a constant says all that its type and its twins say."""
    kept: dict[tuple[str, str], StateRead] = {}
    for read in reads:
        kept.setdefault((read.expression, read.condition), read)
    return tuple(kept.values())
