"""Values in words, for the ledger: a constant as it is written, an object by its name or its type."""

from __future__ import annotations

import enum
import hashlib
import types
from collections.abc import Callable
from typing import Any

import torch

from onegraph.capture.state_check import LITERALS
from onegraph.ir.source_text import code_digest
from onegraph.torch_compat.torch_state import is_operator


def type_name(value: Any) -> str:
    """The type's qualified name, without the module for a builtin."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def one_object(value: Any, first_place: str | None) -> Callable[[Any], str]:
    """Words for what stands at the object's place: its type, and where else it stands; or that it is another one."""
    itself = type_name(value) if first_place is None else f"{type_name(value)}, which is {first_place}"
    return lambda now: (
        itself if now is value else type_name(now) if type(now) is not type(value) else f"another {itself}"
    )


def number_of_hooks(value: Any) -> str:
    """For a dict of hooks."""
    return f"{len(value) or 'no'} hooks"


_VALUES = (*LITERALS, torch.dtype, torch.device, torch.Size, torch.layout)
_NAMED = (enum.Enum, type, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.ModuleType)


def described(value: Any) -> str:
    """A constant, or an object in words: by its name, where it has one, with the digest of its code."""
    if isinstance(value, torch.Tensor):
        return f"the tensor {value.dtype} {tuple(value.shape)} of id {id(value):#x}"
    if isinstance(value, enum.Enum):
        return f"{type(value).__module__}.{type(value).__qualname__}.{value.name}"
    if isinstance(value, (*_VALUES, tuple, frozenset)):
        return short(f"{value!r}")
    if isinstance(value, types.FunctionType):
        return f"{value.__module__}.{value.__qualname__}, code {code_digest(value.__code__)[:12]}"
    if isinstance(value, types.CodeType):
        return f"code {value.co_qualname} {code_digest(value)[:12]}"
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    name = getattr(value, "__qualname__", getattr(value, "__name__", None))
    module = getattr(value, "__module__", None)
    return f"{module}.{name}" if name and module else f"one {type(value).__name__}"


def has_a_name(value: Any) -> bool:
    """Whether `described` tells the value from every other, in another process too."""
    if isinstance(value, tuple | frozenset):
        return all(map(has_a_name, value))
    return isinstance(value, (*_VALUES, *_NAMED)) or is_operator(value)


def short(text: str) -> str:
    """The text, or its beginning with a digest of the whole."""
    return text if len(text) <= 200 else f"{text[:160]}… sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
