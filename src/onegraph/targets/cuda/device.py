"""The CUDA device as this process sees it: whether there is one, and what it is."""

from __future__ import annotations

import torch


def problem() -> str | None:
    """Why there is no CUDA device; None where there is one."""
    if torch.cuda.is_available():
        return None
    return "this torch sees no GPU" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"


def description() -> str:
    """A few words on the current device, for people."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory = f"{found.total_memory / 2**30:.0f} GiB"
    return f"{found.name}, {memory}, CUDA {torch.version.cuda}, compute capability {found.major}.{found.minor}"
