"""Whether onegraph can run here: the platform and the version of torch, checked before the first use."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys

from onegraph.env import environment
from onegraph.errors import ConfigError
from onegraph.log import set_level

TORCH_MIN, TORCH_BELOW = (2, 11), (2, 14)
PLATFORMS = (("linux", "x86_64"), ("linux", "aarch64"))


@functools.cache
def require_supported() -> None:
    """Raises ConfigError, in one line that says what to do, where onegraph can't run."""
    current = environment()
    set_level(current.log_level)
    for problem in (platform_problem(), None if current.allow_untested_torch else torch_problem()):
        if problem is not None:
            raise ConfigError(problem)


def platform_problem() -> str | None:
    """Why this platform isn't supported, or None."""
    here = (sys.platform, platform.machine())
    if here in PLATFORMS:
        return None
    return f"onegraph runs on Linux x86-64 and aarch64, not on {here[0]} {here[1]}"


def torch_problem() -> str | None:
    """Why the installed torch isn't supported, or None."""
    wanted = f">={TORCH_MIN[0]}.{TORCH_MIN[1]},<{TORCH_BELOW[0]}.{TORCH_BELOW[1]}"
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return f"torch isn't installed; onegraph needs torch{wanted}: pip install 'torch{wanted}'"
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in version.split(".")[:2])
    if TORCH_MIN <= (major, minor) < TORCH_BELOW:
        return None
    return (
        f"torch {version} is installed, and onegraph is tested with torch{wanted}: install one of those, "
        "or set ONEGRAPH_ALLOW_UNTESTED_TORCH=1"
    )
