"""torch's own logs (TORCH_LOGS, `torch._logging.set_logs`), for what happens where torch prints nothing.

A warm start runs neither Dynamo nor Inductor, whose logs would tell of it; here the same names print what was kept, and
neither is imported. A text is only made for a log that somebody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from torch._logging import getArtifactLogger

Artifact = Literal["output_code", "graph_code", "graph_breaks", "guards", "recompiles"]
ARTIFACTS: tuple[Artifact, ...] = ("output_code", "graph_code", "graph_breaks", "guards", "recompiles")

_dynamic = logging.getLogger("torch.fx.experimental.symbolic_shapes")
"""The log behind `dynamic`."""


def log_artifact(name: Artifact, text: Callable[[], str]) -> None:
    """Prints what TORCH_LOGS calls by this name."""
    log = _logger(name)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s", text(), stacklevel=2)


def log_dynamic(text: Callable[[], str]) -> None:
    """Prints what TORCH_LOGS=dynamic asks for: dims, and conditions on sizes."""
    if _dynamic.isEnabledFor(logging.INFO):
        _dynamic.info("%s", text(), stacklevel=2)


def a_log_is_read() -> bool:
    """Whether any of these is printed."""
    return _dynamic.isEnabledFor(logging.INFO) or any(_logger(name).isEnabledFor(logging.DEBUG) for name in ARTIFACTS)


def _logger(name: Artifact) -> logging.Logger:
    """Its name is below `torch`, which has the handlers."""
    log: logging.Logger = getArtifactLogger("torch.onegraph", name)
    return log
