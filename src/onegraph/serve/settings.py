"""The settings of the server itself, with their flags: one declaration each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from onegraph.errors import ConfigError


def _setting(
    default: Any, kind: type, text: str, *, low: float = 0, high: float = math.inf, several: bool = False
) -> Any:
    metadata = {"kind": kind, "help": text, "low": low, "high": high, "several": several}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ServeSettings:
    """What the flags of `onegraph serve` set beside the engine's. Raises ConfigError for a value without sense."""

    host: str = _setting("127.0.0.1", str, "the address to listen on")
    port: int = _setting(8000, int, "the port to listen on; 0 takes a free one, which the first line tells", high=65535)
    api_key: tuple[str, ...] = _setting(
        (),
        str,
        "a key that /v1, /explain and /profile ask for, as `Authorization: Bearer KEY`; more than one may be given",
        several=True,
    )
    served_model_name: tuple[str, ...] = _setting(
        (), str, "the model's name in the API (default: MODEL as given); of several each is known", several=True
    )
    max_queue: int = _setting(
        1024, int, "sequences that may wait beyond --max-num-seqs; what comes then is answered 429"
    )
    max_body_bytes: int = _setting(8 * 2**20, int, "the largest body of a request; a larger one is answered 413", low=1)
    max_n: int = _setting(128, int, "the most samples (n) of a prompt", low=1)
    request_timeout_s: float = _setting(
        600.0, float, "seconds in which a request must be done, else it ends with an error", low=0.001
    )
    drain_timeout_s: float = _setting(60.0, float, "seconds that requests in flight are given after Ctrl-C or SIGTERM")

    def __post_init__(self) -> None:
        for one in fields(self):
            value, low, high = getattr(self, one.name), one.metadata["low"], one.metadata["high"]
            if one.metadata["kind"] is str:
                texts = value if one.metadata["several"] else (value,)
                if not all(isinstance(text, str) and text for text in texts):
                    raise ConfigError(f"{one.name}={value!r}", where=one.name, hint="it takes a text that isn't empty")
            elif isinstance(value, bool) or not isinstance(value, one.metadata["kind"]) or not low <= value <= high:
                upper = f" to {high:g}" if math.isfinite(high) else " or more"
                raise ConfigError(f"{one.name}={value!r}", where=one.name, hint=f"it takes {low:g}{upper}")
