"""The process environment, read in one place. Nothing here ever changes it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onegraph.errors import ConfigError, nearest

VARIABLES = {
    "ONEGRAPH_CACHE_ROOT": "the folder of the compile cache (default: $XDG_CACHE_HOME/onegraph or ~/.cache/onegraph)",
    "ONEGRAPH_CACHE_BASE": "a folder with a compile cache that is only read; what is new goes to the root",
    "ONEGRAPH_CACHE_KEY_FILE": "a file with the key that signs artifacts; those without its signature aren't used",
    "ONEGRAPH_DISABLE_COMPILE_CACHE": "1: the compile cache is neither read nor written",
    "ONEGRAPH_COMPILATION_CONFIG": "JSON with fields of CompilationConfig, merged over everything else",
    "ONEGRAPH_COMPILE_CACHE_SAVE_FORMAT": "binary or unpacked: how artifacts are kept; see edit-artifacts.md",
    "ONEGRAPH_ATTENTION": "own (default) or torch: whose attention runs on a GPU; see cuda.md",
    "ONEGRAPH_LOG_LEVEL": "DEBUG, INFO, WARNING (default) or ERROR",
    "ONEGRAPH_ALLOW_UNTESTED_TORCH": "1: a torch outside the tested range is used all the same",
}
ATTENTION = ("OWN", "TORCH")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True)
class Environment:
    """The variables' values, parsed; the defaults where they aren't set."""

    cache_root: Path
    cache_root_is_explicit: bool
    cache_base: Path | None
    cache_key_file: Path | None
    disable_compile_cache: bool
    compilation_config: dict[str, Any] | None
    compile_cache_save_format: str | None
    attention: str
    log_level: str
    allow_untested_torch: bool


def environment() -> Environment:
    """Reads the variables as they are now. Raises ConfigError for an unknown one, or a value that makes no sense."""
    given = {name: value for name, value in os.environ.items() if name.startswith("ONEGRAPH_")}
    for name in given:
        if name not in VARIABLES:
            raise ConfigError(
                f"there is no environment variable {name}", where="environment", hint=nearest(name, VARIABLES)
            )
    explicit = given.get("ONEGRAPH_CACHE_ROOT")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Environment(
        cache_root=Path(explicit) if explicit else Path(base) / "onegraph",
        cache_root_is_explicit=bool(explicit),
        cache_base=_path(given, "ONEGRAPH_CACHE_BASE"),
        cache_key_file=_path(given, "ONEGRAPH_CACHE_KEY_FILE"),
        disable_compile_cache=_flag(given, "ONEGRAPH_DISABLE_COMPILE_CACHE"),
        compilation_config=_json(given, "ONEGRAPH_COMPILATION_CONFIG"),
        compile_cache_save_format=given.get("ONEGRAPH_COMPILE_CACHE_SAVE_FORMAT") or None,
        attention=_choice(given, "ONEGRAPH_ATTENTION", ATTENTION, "OWN").lower(),
        log_level=_choice(given, "ONEGRAPH_LOG_LEVEL", LOG_LEVELS, "WARNING"),
        allow_untested_torch=_flag(given, "ONEGRAPH_ALLOW_UNTESTED_TORCH"),
    )


def check_torch_trace() -> None:
    """Raises ConfigError for a TORCH_TRACE that torch can't write into; it is torch's, and torch makes the folder."""
    folder = os.environ.get("TORCH_TRACE")
    hint = "set TORCH_TRACE to a folder, or unset it"
    if folder == "":
        raise ConfigError("TORCH_TRACE is empty", where="environment", hint=hint)
    if folder is not None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            told = f"no trace can be written to TORCH_TRACE={folder}: {error.strerror or error}"
            raise ConfigError(told, where="environment", hint=hint) from error


def process_variables() -> os._Environ[str]:
    """The process's environment itself, for code that compares what a model read from it."""
    return os.environ


def _path(given: dict[str, str], name: str) -> Path | None:
    return Path(given[name]) if given.get(name) else None


def _flag(given: dict[str, str], name: str) -> bool:
    value = given.get(name, "")
    if value not in ("", "0", "1"):
        raise ConfigError(f"{name}={value!r}", where="environment", hint="set it to 1 or 0")
    return value == "1"


def _choice(given: dict[str, str], name: str, choices: tuple[str, ...], default: str) -> str:
    value = given.get(name, "").upper() or default
    if value not in choices:
        raise ConfigError(f"{name}={given[name]!r}", where="environment", hint=nearest(value, choices))
    return value


def _json(given: dict[str, str], name: str) -> dict[str, Any] | None:
    text = given.get(name, "")
    if not text:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{name} isn't JSON: {error}", where="environment", hint='such as {"backend": "eager"}'
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is a {type(value).__name__}, not an object", where="environment")
    return value
