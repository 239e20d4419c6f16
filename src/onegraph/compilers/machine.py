"""What of torch and of the machine is in every key."""

from __future__ import annotations

from typing import Any

import torch

from onegraph.ir.target import Target
from onegraph.torch_compat import torch_state


def machine_factors(target: Target) -> dict[str, Any]:
    """What of torch and of the machine decides about code, and about which code is fast."""
    return {
        "torch": {
            "version": torch.__version__,
            "git": torch.version.git_version,
            **torch_state.compile_state(),
        },
        "target": {"name": target.name, **target.fingerprint()},
    }
