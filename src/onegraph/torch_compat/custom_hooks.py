"""The passes that users hung into Inductor, told without importing it: where it isn't imported, there are none."""

from __future__ import annotations

import sys
from typing import Any

HOOKS = (
    "pre_grad_custom_pass",
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
    "_pre_fusion_custom_pass",
    "_post_fusion_custom_pass",
)


def hook_identities() -> dict[str, Any] | str:
    """The uuids of custom passes that users hung into Inductor, or why one has no identity."""
    config = sys.modules.get("torch._inductor.config")
    found: dict[str, Any] = {}
    for name in HOOKS:
        hook = getattr(config, name, None)
        for item in hook if isinstance(hook, list | tuple) else [hook]:
            if item is None:
                continue
            uuid = item.uuid() if hasattr(item, "uuid") else None
            if uuid is None:
                return f"inductor.config.{name} has no uuid(), so what it does can't be part of a key"
            text = uuid.hex() if isinstance(uuid, bytes) else str(uuid)
            found.setdefault(name, []).append(text)
    return found
