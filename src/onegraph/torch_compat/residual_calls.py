"""The helpers that residual code calls, without Dynamo's module for them, which takes seconds to import.

Sizes are read, and the marks for a profiler left out: they cost more than a small call's checks.
"""

from __future__ import annotations

import importlib
from typing import Any


def module(name: str) -> Any:
    """The module that residual code imports, or what stands for it."""
    return _Helpers() if name == "torch._dynamo.utils" else importlib.import_module(name)


class _Helpers:
    """Has what nearly all residual code calls; another attribute is that of `torch._dynamo.utils`."""

    @staticmethod
    def call_size(tensor: Any, dim: int) -> int:
        return int(tensor.size(dim))

    @staticmethod
    def call_stride(tensor: Any, dim: int) -> int:
        return int(tensor.stride(dim))

    @staticmethod
    def call_storage_offset(tensor: Any) -> int:
        return int(tensor.storage_offset())

    @staticmethod
    def object_setattr_ignore_descriptor(holder: Any, name: str, value: Any) -> None:
        """Writes past what the class has at the name."""
        try:
            object.__getattribute__(holder, "__dict__")[name] = value
        except AttributeError:  # threading.local
            _dynamos().object_setattr_ignore_descriptor(holder, name, value)

    @staticmethod
    def record_pregraph_bytecode_enter() -> None:
        return None

    @staticmethod
    def record_pregraph_bytecode_exit(mark: None) -> None:
        return None

    object_new = staticmethod(object.__new__)

    def __getattr__(self, name: str) -> Any:
        return getattr(_dynamos(), name)


def _dynamos() -> Any:
    return importlib.import_module("torch._dynamo.utils")
