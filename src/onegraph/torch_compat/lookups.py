"""What tracing looked up and did not find: Dynamo takes it for absent for good, and guards only what it found.

Hooked here one by one: a key of a dict (`except KeyError`), an attribute of an object, a module or a Python module
(`except AttributeError`, `getattr` with a default), an attribute that only `__getattr__` has, and a global that
would hide a builtin.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.exc import ObservedAttributeError, ObservedKeyError
from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.misc import PythonModuleVariable
from torch._dynamo.variables.user_defined import UserDefinedObjectVariable
from torch._guards import TracingContext

from onegraph.ir.traced import GuardFact, UsedBuiltin
from onegraph.torch_compat.shapes import is_torch_file

_GETATTR = "generic_getattr" if hasattr(UserDefinedObjectVariable, "generic_getattr") else "var_getattr"
"""Torch 2.11 has no generic_getattr: the look-up stands in var_getattr itself."""


@dataclass(frozen=True)
class Lookups:
    """`absent` are facts of the kinds of Dynamo's own guards."""

    absent: list[GuardFact] = field(default_factory=list)
    builtins: list[UsedBuiltin] = field(default_factory=list)


@contextmanager
def lookups() -> Iterator[Lookups]:
    """Collects what the traces inside did not find."""
    found = Lookups()
    key_of, attribute_of, of_module, module_has, builtin = (
        ConstDictVariable.getitem_const_raise_exception_if_absent,
        getattr(UserDefinedObjectVariable, _GETATTR),
        PythonModuleVariable.var_getattr,
        PythonModuleVariable.call_obj_hasattr,
        InstructionTranslatorBase.load_builtin,
    )

    def absent(variable: Any, kind: str, **keywords: Any) -> None:
        if variable.source is not None:
            found.absent.append(GuardFact(variable.source.name, kind, _user_line(), keywords))

    def get_key(self: Any, tx: Any, arg: Any) -> Any:
        try:
            return key_of(self, tx, arg)
        except ObservedKeyError:
            if arg.is_python_constant():
                absent(self, "DICT_NOT_CONTAINS", key=arg.as_python_constant())
            raise

    def get_attribute(self: Any, tx: Any, name: str) -> Any:
        try:
            result = attribute_of(self, tx, name)
        except ObservedAttributeError:
            absent(self, "HASATTR", attr=name)
            raise
        if not isinstance(self.value, torch.nn.Module) and not _has_itself(self.value, name):
            absent(self, "NOT_PRESENT_IN_GENERIC_DICT", attr=name)
        return result

    def get_of_module(self: Any, tx: Any, name: str) -> Any:
        try:
            return of_module(self, tx, name)
        except ObservedAttributeError:
            absent(self, "HASATTR", attr=name)
            raise

    def has_module(self: Any, tx: Any, name: str) -> Any:
        absent(self, "HASATTR", attr=name)
        return module_has(self, tx, name)

    def load_builtin(self: Any, inst: Any) -> None:
        code: types.CodeType = self.f_code
        if not is_torch_file(code.co_filename):
            found.builtins.append(
                UsedBuiltin(inst.argval, self.f_globals, f"{code.co_filename}:{self.lineno or code.co_firstlineno}")
            )
        builtin(self, inst)

    with ExitStack() as hooks:
        for holder, hook in (
            (ConstDictVariable, ("getitem_const_raise_exception_if_absent", key_of, get_key)),
            (UserDefinedObjectVariable, (_GETATTR, attribute_of, get_attribute)),
            (PythonModuleVariable, ("var_getattr", of_module, get_of_module)),
            (PythonModuleVariable, ("call_obj_hasattr", module_has, has_module)),
            (InstructionTranslatorBase, ("load_builtin", builtin, load_builtin)),
        ):
            name, before, replacement = hook
            hooks.callback(setattr, holder, name, before)
            setattr(holder, name, replacement)
        yield found


def _has_itself(value: Any, name: str) -> bool:
    """Whether the lookup ends at the object or its class, so that `__getattr__` isn't asked."""
    return name in getattr(value, "__dict__", ()) or any(name in vars(base) for base in type(value).__mro__)


def _user_line() -> str | None:
    frame = next((f for f in reversed(TracingContext.extract_stack()) if not is_torch_file(f.filename)), None)
    return None if frame is None else f"{frame.filename}:{frame.lineno}"
