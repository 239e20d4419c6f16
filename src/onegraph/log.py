"""Logging under the name `onegraph`: quiet unless ONEGRAPH_LOG_LEVEL says otherwise."""

from __future__ import annotations

import logging


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of ours. Without a handler of the application's, warnings go to stderr."""
    return logging.getLogger(name)


def set_level(level: str) -> None:
    """Sets the level of all of onegraph's loggers, and gives them a handler if the application has none."""
    root = logging.getLogger("onegraph")
    root.setLevel(level)
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("onegraph %(levelname).1s %(name)s: %(message)s"))
        root.addHandler(handler)
