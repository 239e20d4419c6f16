"""What the CPU can do, and where torch's C functions lie: known without Inductor, which takes a second to import."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def cpu_flags() -> str:
    """What the CPU can do, as the system's kernel lists it: code is built for the native CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return " ".join(sorted(line.split(":", 1)[1].split()))
    return platform.machine()


def tensor_data_pointer_function() -> int:
    """The address of torch's C function from a Python tensor to its data pointer."""
    return int(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)  # type: ignore[attr-defined]
