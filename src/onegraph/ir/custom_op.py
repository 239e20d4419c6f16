"""CustomOp: what is known of an op that is neither torch's nor ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CustomOp:
    """One custom op of a graph: where it is called first, and whether it was checked on real values yet."""

    name: str
    user: str | None
    checked: bool = False

    def to_dict(self) -> dict[str, object]:
        return {"name": self.name, "user": self.user, "check": "checked" if self.checked else "pending"}
