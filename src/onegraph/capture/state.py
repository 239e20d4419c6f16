"""The ledger of Python state: every value that a trace read from outside its arguments, and its check.

Takes Dynamo's guards, the traced function and its `self`, and the weights of the graph. Gives one
StateRead for each: a ledger entry, and how to compare what stands there now with what stood there right after
tracing. `state_check` makes one function of them.
"""

from __future__ import annotations

import ast
import enum
import functools
import hashlib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onegraph.capture.inputs import CallInputs
from onegraph.capture.state_check import LITERALS, differs, evaluate
from onegraph.env import process_variables
from onegraph.errors import CaptureError
from onegraph.ir.graph import WeightInput
from onegraph.ir.ledger import CheckedWhen, StateEntry, StateRead
from onegraph.ir.source_text import code_digest
from onegraph.torch_compat.folds import FoldedCall
from onegraph.torch_compat.guards import GuardFact, expression_scope
from onegraph.torch_compat.shapes import is_torch_file
from onegraph.torch_compat.torch_state import GLOBAL_READS

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ENVIRONMENT_NAMES = frozenset({"environ", "environb", "getenv", "getenvb"})
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)

# Guards on what the input contract or the ledger of shapes checks, or what the compiled code never does.
_CHECKED_ELSEWHERE = frozenset(
    {
        "SHAPE_ENV",
        "GRAD_MODE",  # read by name where the user's code asks; the entry runs without gradients in any mode
        "AUTOGRAD_SAVED_TENSORS_HOOKS",  # inference saves nothing
        "GLOBAL_STATE",  # read by name, in GLOBAL_READS
        "DEFAULT_DEVICE",
        "DETERMINISTIC_ALGORITHMS",
        "TORCH_FUNCTION_STATE",
        "FSDP_TRAINING_STATE",
        "DUPLICATE_INPUT",
    }
)


@dataclass(frozen=True)
class _Scope:
    """What the names in guard expressions mean: `constants` are objects that stand for whole prefixes."""

    globals_read: Mapping[str, Any]
    constants: Mapping[str, Any]
    functions: Mapping[str, Any]


def state_reads(
    facts: tuple[GuardFact, ...],
    *,
    function: Any,
    owner: Any,
    inputs: CallInputs,
    weights: tuple[WeightInput, ...],
    globals_read: Mapping[str, Any],
    traced_code: Iterable[types.CodeType],
    folded: Iterable[FoldedCall],
) -> tuple[StateRead, ...]:
    """One read for each fact of the trace that isn't about an argument, in a stable order.

    Raises CaptureError for a value that the trace read and that can't be read again.
    """
    scope = _scope(function, owner, inputs, globals_read)
    by_tensor = {id(weight.holder[weight.key]): weight for weight in weights}
    reads: list[StateRead] = []
    classes: dict[int, type] = {}
    for fact in facts:
        if fact.kind in _CHECKED_ELSEWHERE or not fact.name:
            continue
        expression = _rooted(fact.name, scope)
        if expression is None:
            continue
        try:
            value = evaluate(expression[0], expression[1])
        except Exception as error:
            raise CaptureError(
                f"{_shown(fact.name, scope)} was read while tracing, and can't be read again: {error!r}",
                where=fact.user,
                hint="keep such a value in a plain attribute, or pass it as an argument",
            ) from error
        read = _read(fact, expression, value, by_tensor, _shown(fact.name, scope))
        reads += [read] if read is not None else []
        if fact.kind == "TYPE_MATCH" and type(value) not in (dict, list, tuple):
            classes[id(type(value))] = type(value)
    codes = set(traced_code)
    reads += _method_reads(classes.values(), codes)
    reads.append(_code_read(function.__qualname__, function, _root(function)))
    if isinstance(owner, torch.nn.Module):
        reads += _owner_reads(owner)
    reads += _environment_reads(codes)
    reads += _global_reads(reads_grad_mode(facts))
    reads += map(_fold_read, folded)
    return _distinct(reads)


def _scope(function: Any, owner: Any, inputs: CallInputs, globals_read: Mapping[str, Any]) -> _Scope:
    constants: dict[str, Any] = {}
    if owner is not None:
        constants[f"L['{function.__code__.co_varnames[0]}']"] = owner
    for leaf in inputs.leaves:
        if not isinstance(leaf.value, (torch.Tensor, *LITERALS)):
            constants[leaf.source] = constants[leaf.indexed_source] = leaf.value
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        constants[f"L['{name}']"] = constants[f"L[{name!r}]"] = _Cell(cell)
    return _Scope(globals_read, constants, expression_scope())


@dataclass(frozen=True)
class _Cell:
    """Marks a local of the traced function that is a closure variable, read through its cell."""

    cell: Any


def _rooted(name: str, scope: _Scope) -> tuple[str, dict[str, Any]] | None:
    """The guard's expression with its roots replaced by names, and these names; None if it is about an argument."""
    tree = ast.parse(name, mode="eval").body
    roots = _Roots(scope)
    text = ast.unparse(roots.visit(tree))
    return None if roots.is_argument else (text, roots.names)


class _Roots(ast.NodeTransformer):
    """Replaces `L[...]`, `G[...]` and function names by names of constants; drops copies (`dict(x)['a']`)."""

    def __init__(self, scope: _Scope) -> None:
        self.scope, self.is_argument = scope, False
        self.names: dict[str, Any] = {}

    def constant(self, value: Any) -> ast.Name:
        name = f"_k{id(value):x}"
        self.names[name] = value
        return ast.Name(name, ast.Load())

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Subscript | ast.Attribute):
            known = self.scope.constants.get(ast.unparse(node), self)
            if isinstance(known, _Cell):
                return ast.Attribute(self.constant(known.cell), "cell_contents", ast.Load())
            if known is not self:
                return self.constant(known)
        return super().visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        if isinstance(node.value, ast.Name) and node.value.id == "L":
            self.is_argument = True
        if isinstance(node.value, ast.Name) and node.value.id == "G" and isinstance(node.slice, ast.Constant):
            key = str(node.slice.value)
            if key.startswith(("__import_", "__builtins_dict__")):  # Dynamo's own names for a module
                return self.constant(self.scope.globals_read[key])
            return ast.Subscript(self.constant(self.scope.globals_read), node.slice, ast.Load())
        if (
            isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Name)
            and node.value.func.id == "dict"
            and ast.unparse(node.value).endswith(".__dict__)")
        ):
            return self.generic_visit(ast.Subscript(node.value.args[0], node.slice, ast.Load()))
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id in self.scope.functions:
            return self.constant(self.scope.functions[node.id])
        return node


def _state_read(
    what: str,
    user: str | None,
    rooted: tuple[str, Mapping[str, Any]],
    condition: str,
    describe: Callable[[Any], str],
    **constants: Any,
) -> StateRead:
    """A read whose value now is the expected one. In `condition`, `{x}` is the value and `$name` a constant."""
    text, names = rooted
    named = re.sub(r"\$(\w+)", lambda match: f"_v{id(constants[match[1]]):x}", condition)
    value = evaluate(text, names)
    entry = StateEntry(what, describe(value), user=user, portable=describe is not _described or _has_a_name(value))
    return StateRead(entry, text, named, {**names, **{f"_v{id(c):x}": c for c in constants.values()}}, describe)


def _root(value: Any) -> tuple[str, dict[str, Any]]:
    """An object as the root of an expression."""
    name = f"_k{id(value):x}"
    return name, {name: value}


def _read(
    fact: GuardFact, rooted: tuple[str, dict[str, Any]], value: Any, by_tensor: Mapping[int, WeightInput], what: str
) -> StateRead | None:
    read = functools.partial(_state_read, what, fact.user, rooted)
    kind, attribute, key = fact.kind, fact.keywords.get("attr"), fact.keywords.get("key")
    if isinstance(value, torch.Tensor):
        weight = by_tensor.get(id(value))
        if weight is None:
            return read("{x} is not $tensor", _described, tensor=value)
        return read(
            "{x} is not $holder[$key] or {x} is None",
            lambda now: weight.name if now is weight.holder[weight.key] else _described(now),
            holder=weight.holder,
            key=weight.key,
        )
    if kind == "TYPE_MATCH":
        return read("$type({x}) is not $expected", _type_name, type=type, expected=type(value))
    if kind == "HASATTR":
        has = hasattr(value, str(attribute))
        return read(
            f"$hasattr({{x}}, {attribute!r}) is not {has}",
            lambda now: f"{'with' if hasattr(now, str(attribute)) else 'without'} {attribute}",
            hasattr=hasattr,
        )
    if kind == "NOT_PRESENT_IN_GENERIC_DICT":
        return _own_attribute_read(read, value, str(attribute))
    if kind in ("DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"):
        there = key in value
        return read(
            f"($key in {{x}}) is not {there}", lambda now: f"{'with' if key in now else 'without'} {key!r}", key=key
        )
    if kind == "EMPTY_NN_MODULE_HOOKS_DICT":
        return read("{x}", _hooks)
    if kind in ("DICT_KEYS_MATCH", "MAPPING_KEYS_CHECK"):
        return read("$list({x}) != $keys", lambda now: _short(f"keys {list(now)!r}"), list=list, keys=list(value))
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
            return read("{x}.__code__ is not $code", _described, code=value.__code__)
        return read(
            "{x} is not $function or {x}.__code__ is not $code", _described, function=value, code=value.__code__
        )
    if value is None or isinstance(value, bool):
        return read(f"{{x}} is not {value}", _described)
    if isinstance(value, LITERALS) or kind in ("CONSTANT_MATCH", "EQUALS_MATCH", "CONSTANT_SUBCLASS_MATCH"):
        return read("{x} is not $value and $differs({x}, $value)", _described, value=value, differs=differs)
    return read("{x} is not $object", _described, object=value)


def _own_attribute_read(read: Callable[..., StateRead], value: Any, attribute: str) -> StateRead | None:
    """The class decides what `attribute` is, as long as the object has none of its own."""
    if not hasattr(value, "__dict__"):
        return None
    return read(
        f"{attribute!r} in {{x}}.__dict__",
        lambda now: f"{'with' if attribute in vars(now) else 'without'} {attribute} of its own",
    )


def _type_name(value: Any) -> str:
    return type(value).__qualname__


def _hooks(value: Any) -> str:
    return f"{len(value) or 'no'} hooks"


_VALUES = (*LITERALS, torch.dtype, torch.device, torch.Size, torch.layout)


def _described(value: Any) -> str:
    """A constant, or an object in words: by its name, where it has one, with the digest of its code."""
    if isinstance(value, torch.Tensor):
        return f"the tensor {value.dtype} {tuple(value.shape)} of id {id(value):#x}"
    if isinstance(value, enum.Enum):
        return f"{type(value).__module__}.{type(value).__qualname__}.{value.name}"
    if isinstance(value, (*_VALUES, tuple, frozenset)):
        return _short(f"{value!r}")
    if isinstance(value, types.FunctionType):
        return f"{value.__module__}.{value.__qualname__}, code {code_digest(value.__code__)[:12]}"
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    name = getattr(value, "__qualname__", getattr(value, "__name__", None))
    module = getattr(value, "__module__", None)
    return f"{module}.{name}" if name and module else f"one {type(value).__name__}"


def _has_a_name(value: Any) -> bool:
    """Whether `_described` tells the value from every other, in another process too."""
    if isinstance(value, tuple | frozenset):
        return all(map(_has_a_name, value))
    if isinstance(value, (*_VALUES, enum.Enum, type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)):
        return True
    return isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket)


def _short(text: str) -> str:
    """The text, or its beginning with a digest of the whole."""
    return text if len(text) <= 200 else f"{text[:160]}… sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _method_reads(classes: Iterable[type], traced: set[types.CodeType]) -> Iterator[StateRead]:
    """Methods that were inlined: a class whose method is replaced, or whose method's code is, changes the trace."""
    for cls in classes:
        text, names = _root(cls)
        for name in sorted({name for base in cls.__mro__ for name in vars(base)}):
            method = getattr(cls, name, None)
            if isinstance(method, types.FunctionType) and method.__code__ in traced:
                yield _code_read(f"{cls.__qualname__}.{name}", method, (f"{text}.{name}", names))


def _code_read(what: str, function: types.FunctionType, rooted: tuple[str, Mapping[str, Any]]) -> StateRead:
    code = function.__code__
    user = f"{code.co_filename}:{code.co_firstlineno}"
    return _state_read(what, user, rooted, "{x}.__code__ is not $code", _described, code=code)


def _owner_reads(owner: torch.nn.Module) -> Iterator[StateRead]:
    """What `module(...)` would do beside its forward, and which forward it has."""
    text, names = _root(owner)
    yield _state_read("self.training", None, (f"{text}.training", names), f"{{x}} is not {owner.training}", _described)
    for hooks in _HOOKS:
        if not getattr(owner, hooks):
            yield _state_read(f"self.{hooks}", None, (f"{text}.{hooks}", names), "{x}", _hooks)
    if "forward" not in vars(owner):
        own = _own_attribute_read(functools.partial(_state_read, "self", None, (text, names)), owner, "forward")
        if own is not None:
            yield own
    text, names = _root(torch.nn.modules.module)
    for hooks in _GLOBAL_HOOKS:
        if not getattr(torch.nn.modules.module, hooks):
            what = f"torch.nn.modules.module.{hooks}"
            yield _state_read(what, None, (f"{text}.{hooks}", names), "{x}", _hooks)


def _environment_reads(traced: Iterable[types.CodeType]) -> Iterator[StateRead]:
    """The whole environment, if traced code names it: Dynamo guards neither a missing variable nor `os.getenv`."""
    reading = [code for code in traced if not _ENVIRONMENT_NAMES.isdisjoint(code.co_names)]
    if not reading:
        return
    code = min(reading, key=lambda code: (is_torch_file(code.co_filename), code.co_filename, code.co_firstlineno))
    variables = process_variables()
    before = dict(variables)

    def described(now: Mapping[str, str]) -> str:
        changed = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
        return f"other values of {', '.join(changed)}" if changed else f"{len(before)} variables"

    raw = {**variables._data}  # type: ignore[attr-defined]
    text, names = _root(variables)
    condition = "{x}._data != $raw"
    yield _state_read(
        "os.environ", f"{code.co_filename}:{code.co_firstlineno}", (text, names), condition, described, raw=raw
    )


def reads_grad_mode(facts: Iterable[GuardFact]) -> bool:
    """Whether the user's code asks for the grad mode. It runs without gradients, but it may look."""
    return any(fact.kind == "GRAD_MODE" and fact.user is not None for fact in facts)


def _global_reads(grad_mode: bool) -> Iterator[StateRead]:
    getters = {**GLOBAL_READS, **({"torch.is_grad_enabled()": torch.is_grad_enabled} if grad_mode else {})}
    for what, getter in getters.items():
        text, names = _root(getter)
        yield _state_read(what, None, (f"{text}()", names), "{x} != $value", _described, value=getter())


def _fold_read(folded: FoldedCall) -> StateRead:
    """A call that was run while tracing, and its result: compared with what the same call gives now.

    What the user declared constant, and what is installed, is asked again by another process alone.
    """
    function, names = _root(folded.function)
    arguments = [_root(value) for value in folded.args]
    named = {key: _root(value) for key, value in folded.kwargs.items()}
    for _, constants in (*arguments, *named.values()):
        names.update(constants)
    passed = [text for text, _ in arguments] + [f"{key}={text}" for key, (text, _) in named.items()]
    shown = [f"{value!r:.40}" for value in folded.args] + [f"{k}={v!r:.40}" for k, v in folded.kwargs.items()]
    called = _described(folded.function).partition(",")[0]
    known = all(map(_has_a_name, (folded.function, folded.result, *folded.args, *folded.kwargs.values())))
    when: CheckedWhen = "call" if folded.kind == "state" else "load" if known else "never"
    value = folded.result
    return StateRead(
        StateEntry(f"{called}({', '.join(shown)})", _described(value), when, folded.user, portable=known),
        f"{function}({', '.join(passed)})",
        f"_differs({{x}}, _v{id(value):x})",
        {**names, "_differs": differs, f"_v{id(value):x}": value},
        _described,
    )


def _distinct(reads: Iterable[StateRead]) -> tuple[StateRead, ...]:
    """Each check once, under its first user line; a constant says all that its type and its twins say."""
    kept: dict[tuple[str, str], StateRead] = {}
    for read in reads:
        kept.setdefault((read.expression, read.condition), read)
    return tuple(kept.values())


def _shown(name: str, scope: _Scope) -> str:
    """The expression as its user would write it: `self.layers.0.scale`."""
    text = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", name)
    text = re.sub(r"dict\((.*?)\.__dict__\)\['([^']*)'\]", r"\1.\2", text)
    text = re.sub(r"G\['__import_([^']*)'\]", lambda match: match[1].replace("_dot_", "."), text)
    text = re.sub(r"G\['__builtins_dict__[^']*'\]\['([^']*)'\]", r"\1", text)
    text = re.sub(r"G\['([^']*)'\]", r"\1", text)
    for prefix, value in scope.constants.items():
        if prefix.startswith("L[") and not isinstance(value, _Cell):
            text = text.replace(prefix, "self" if prefix == next(iter(scope.constants)) else prefix[3:-2])
    return re.sub(r"L\['([^']*)'\]", r"\1", text)
