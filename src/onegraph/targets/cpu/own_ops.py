"""The library of the CPU's kernels for onegraph's own ops: one C++ text, one build, an implementation for each op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onegraph.targets.cpu import attention, largest, linear, rotary

FLAGS = ("-ffp-contract=fast",)
"""Beside those of Inductor, which rounds products before they are added, as eager does; ours are judged in fp64."""

SOURCES = (
    "bindings.h",
    "vectors.h",
    "amx.h",
    "attention.h",
    "attention_amx.h",
    "attention.cpp",
    "kv_cache.h",
    "rotary.h",
    "largest.h",
    "linear.h",
    "linear_amx.h",
    "linear_blocked.h",
    "linear.cpp",
    "own_ops.cpp",
)


def library_source() -> str:
    """The C++ text of the extension module `onegraph_kernels`, whose functions are listed in `own_ops.cpp`."""
    folder = Path(__file__).parent
    return "".join((folder / name).read_text() for name in SOURCES)


def implementations(library: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """By op name; each is called with CPU tensors as its op's schema says.

    One with a result also takes `out`: contiguous memory of the result's shape and dtype, which it may use for it.
    """
    return {
        **attention.implementations(library),
        **rotary.implementations(library),
        **largest.implementations(library),
        "linear": linear.Linear(library),
    }
