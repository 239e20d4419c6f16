"""What of torch's own configuration isn't as torch ships it, without importing what it configures.

A module that isn't imported yet has its defaults: those of torch's version, and of the environment.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from typing import Any

from torch.utils._config_module import _UNSET_SENTINEL

from onegraph.env import process_variables

_MODULES = (
    "torch._dynamo.config",
    "torch._inductor.config",
    "torch._functorch.config",
    "torch.fx.experimental._config",
    "torch.compiler.config",
)
_PREFIXES = ("TORCH", "PYTORCH", "AOT_", "INDUCTOR_")
_OF_NO_EFFECT = frozenset(
    {"TORCH_LOGS", "TORCH_LOGS_OUT", "TORCH_LOGS_FORMAT", "TORCH_TRACE", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR"}
)


def changed_config() -> dict[str, Any]:
    """JSON-able: the changed settings by module, and torch's environment variables."""
    found: dict[str, Any] = {}
    for name in _MODULES:
        config = sys.modules.get(name)
        if config is not None:
            changed = _changed(config, getattr(config, "_cache_config_ignore_prefix", []))
            if changed:
                found[name] = changed
    variables: Mapping[str, str] = process_variables()
    given = {key: value for key, value in variables.items() if key.startswith(_PREFIXES) and key not in _OF_NO_EFFECT}
    return {**found, "environment": dict(sorted(given.items()))} if given else found


def cpp_settings() -> dict[str, Any]:
    """What of Inductor's settings for C++ isn't as torch ships it, with the environment's choice of a compiler."""
    config = sys.modules.get("torch._inductor.config")
    changed = {} if config is None else _changed(config, [])
    of_cpp = {name: value for name, value in changed.items() if name.startswith(("cpp.", "aot_inductor."))}
    return {**of_cpp, "CXX": process_variables().get("CXX")}


def _changed(config: Any, ignored: list[str]) -> dict[str, Any]:
    """The settings of one module that have another value than torch and the environment give them.

    To torch, a setting that was patched for a while is changed for good.
    """
    found = {}
    for name, value in sorted(config._get_dict(ignored_prefixes=ignored, skip_default=True).items()):
        entry = config._config[name]
        given = (entry.env_value_force, entry.env_value_default, entry.default)
        default = next((one for one in given if one is not _UNSET_SENTINEL), None)
        if repr(value) != repr(default):
            found[name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    """A constant as it is, another object by its repr's digest."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
