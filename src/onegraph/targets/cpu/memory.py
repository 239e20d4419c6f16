"""Host memory: how much there is, and tensors that take theirs only when they are written."""

from __future__ import annotations

import mmap
from math import prod
from pathlib import Path

import torch


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in an anonymous mapping of their own: pages cost memory when they are first written.

    Raises MemoryError on a machine that doesn't overcommit.
    """
    try:
        pages = mmap.mmap(-1, prod(shape) * dtype.itemsize)
    except OSError as error:
        raise MemoryError(str(error)) from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process can still take: the kernel's estimate, within the limit of its control group.

    None where the kernel does not say.

    Source: proc(5) MemAvailable; cgroup v2 memory.max, memory.current and memory.stat (file cache that the
    kernel can take back counts as available).
    """
    available = _field(root / "proc/meminfo", "MemAvailable:")
    if available is None:
        return None
    available *= 1024
    group = root / "sys/fs/cgroup"
    try:
        limit, usage = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return available
    reclaimable = _field(group / "memory.stat", "inactive_file") or 0
    return max(0, min(available, limit - usage + reclaimable))


def _field(path: Path, name: str) -> int | None:
    """The number that follows `name` in a file of lines."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(words[1]) for line in lines if (words := line.split()) and words[0] == name), None)
