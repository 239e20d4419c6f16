"""What means the same in every process: values as text to compare, and objects as bytes that name what they are.

A text is made anew by each process from what stands there now, so that equal texts mean that a trace's check would
hold. What can't be told from others of its type in another process has no text.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib
import io
import marshal
import pickle
import re
import sys
import types
from collections.abc import Mapping
from typing import Any

import torch

from onegraph.capture.state_check import LITERALS
from onegraph.ir.ledger import StateRead
from onegraph.ir.source_text import code_digest
from onegraph.torch_compat.tensor_checks import KindCheck
from onegraph.torch_compat.torch_state import is_operator

_PLAIN = (*LITERALS, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, range, slice)
_NAMED = (type, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_NAMES = re.compile(r"\b_[kovc][0-9a-f]+\b")


_FOR_READERS = frozenset({"__doc__", "__firstlineno__", "__static_attributes__"})
"""Of a class: what changes with edits that change nothing."""


class NotPortableError(Exception):
    """It means something in this process alone; the message says what."""


class Texts:
    """Texts of values. `roots` are objects by their ids that have a name of their own: the module itself, say."""

    def __init__(self, roots: Mapping[int, str]) -> None:
        self._roots = roots
        self._known: dict[tuple[int, bool], tuple[str, Any]] = {}  # with the value, so that its id doesn't come again

    def read(self, read: StateRead) -> str:
        """The check of a read, with all that it is compared with.

        An object whose type alone is told stands for any of its type: the words of its entry say where else it stands.
        """
        check = self._filled(f"{read.expression}\n{read.condition}", read.names, read.entry.portable)
        return f"{read.entry.what}\n{read.entry.value}\n{check}"

    def lines(self, lines: tuple[str, ...], names: Mapping[str, Any]) -> str:
        """Lines of code with the objects that they name. Raises NotPortableError."""
        return self._filled("\n".join(lines), names, type_is_enough=False)

    def _filled(self, code: str, names: Mapping[str, Any], type_is_enough: bool) -> str:
        def text(found: re.Match[str]) -> str:
            name = found[0]
            if name not in names:
                return name
            return _one(names[name]) if name.startswith("_o") else self.value(names[name], type_is_enough)

        return _NAMES.sub(text, code)

    def value(self, value: Any, type_is_enough: bool = False) -> str:
        """The text of a value. Raises NotPortableError, unless `type_is_enough`."""
        if id(value) in self._roots:
            return self._roots[id(value)]
        key = id(value), type_is_enough
        if key not in self._known:
            try:
                self._known[key] = self._text(value, type_is_enough), value
            except RecursionError:
                raise NotPortableError(f"{_one(value)} that holds itself") from None
        return self._known[key][0]

    def _text(self, value: Any, loose: bool) -> str:
        inner = functools.partial(self.value, type_is_enough=loose)
        if isinstance(value, enum.Enum):
            return f"{self.value(type(value), True)}.{value.name}"
        if type(value) in _PLAIN or isinstance(value, torch.layout | torch.memory_format):
            return f"{type(value).__name__} {value!r}"
        if type(value) in (tuple, list):
            return f"{type(value).__name__} [{', '.join(map(inner, value))}]"
        if type(value) in (set, frozenset):
            return f"{type(value).__name__} {sorted(map(inner, value))}"
        if type(value) is dict:
            name = _globals_name(value)
            if name is not None:
                return f"globals of {name}"
            return f"dict {[(inner(key), inner(one)) for key, one in value.items()]}"
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, types.CodeType):
            return f"code {value.co_qualname} {code_digest(value)}"
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.CellType):
            return f"cell {inner(value.cell_contents)}"
        if isinstance(value, functools.partial):
            return f"partial {inner(value.func)} {inner(value.args)} {inner(value.keywords)}"
        if isinstance(value, types.MethodType):
            return f"method {inner(value.__func__)} of {inner(value.__self__)}"
        if isinstance(value, _NAMED) or is_operator(value):
            return f"{type(value).__name__} {_named(value)}"
        if isinstance(value, KindCheck):
            return f"kinds {value.facts}"
        if dataclasses.is_dataclass(value) and type(value).__module__.startswith("onegraph."):
            return repr(value)
        if loose:
            return _one(value)
        raise NotPortableError(f"{_one(value)}, of this process alone")

    def _function(self, function: types.FunctionType) -> str:
        """With its defaults and what its closure holds, as far as that has a text of its own."""
        held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        held += function.__closure__ or ()
        words = ", ".join(self.value(one, True) if _is_plain(one) else _one(one) for one in held)
        return f"function {function.__module__}.{function.__qualname__} {code_digest(function.__code__)} [{words}]"

    def _class(self, cls: type) -> str:
        """By its name; one that is neither torch's nor Python's with all that stands in it, and in its bases.

        Tracing asks a class for its bases, its methods and the values of its members, and folds what it says.
        """
        parts = [_named(cls)]
        for base in cls.__mro__ if _is_users(cls) else ():
            parts.append(_named(base))
            members = sorted(vars(base).items()) if _is_users(base) else []
            parts += [f"{name} {self._member(member)}" for name, member in members if name not in _FOR_READERS]
        return f"class {parts[0]} {digest(chr(10).join(parts))}" if parts[1:] else f"class {parts[0]}"

    def _member(self, member: Any) -> str:
        inner = member  # whose own attributes aren't asked for: they are the user's code
        if type(member) in (staticmethod, classmethod):
            inner = member.__func__
        elif type(member) is property:
            inner = member.fget
        if isinstance(inner, types.FunctionType):
            return f"{type(member).__name__} {self._function(inner)}"
        value = member.value if isinstance(member, enum.Enum) else member
        return self.value(value, True) if _is_plain(value) else _one(value)


def _is_plain(value: Any) -> bool:
    """Whether it is a constant, or a container or cell of them alone."""
    if type(value) in (tuple, list, set, frozenset):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, types.CellType):
        try:
            return _is_plain(value.cell_contents)
        except ValueError:  # it is empty yet
            return False
    return type(value) in _PLAIN


def _is_users(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in ("builtins", "torch", *sys.stdlib_module_names)


def _one(value: Any) -> str:
    return f"one {_named(type(value))}"


def _named(value: Any) -> str:
    name = getattr(value, "__qualname__", getattr(value, "__name__", None)) or str(value)
    return f"{getattr(value, '__module__', None)}.{name}"


def _globals_name(value: dict[Any, Any]) -> str | None:
    """The module whose globals they are."""
    name = value.get("__name__")
    module = sys.modules.get(name) if isinstance(name, str) else None
    return name if module is not None and vars(module) is value else None


def digest(text: str) -> str:
    """sha256 (hex)."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return "module", value.__name__
        if type(value) is dict and (name := _globals_name(value)) is not None:
            return "globals", name
        return None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, types.CodeType):
            return marshal.loads, (marshal.dumps(value),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, identity: Any) -> Any:
        kind, name = identity
        module = importlib.import_module(name)
        return module if kind == "module" else vars(module)


def dumped(value: Any) -> bytes:
    """The value's bytes: modules, classes and functions by their names. Raises NotPortableError."""
    stream = io.BytesIO()
    try:
        _Pickler(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    except Exception as error:  # whatever a class's own way to be pickled raises
        raise NotPortableError(f"it can't be written: {type(error).__name__}: {error}") from error
    return stream.getvalue()


def loaded(contents: bytes) -> Any:
    """What `dumped` was given. The bytes are code: they must be known to be our own.

    Raises what importing and unpickling raise.
    """
    return _Unpickler(io.BytesIO(contents)).load()
