"""The key of a piece: the digest of what is handed to the compiler, and of the machine it compiles for.

Nothing here is a list of our options: an option that changes what is compiled changes the graph's text or
Inductor's configuration, and an option that doesn't has no business in a key.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import onegraph.version
from onegraph.compilers.machine import machine_factors
from onegraph.ir.key import Key, Unkeyable
from onegraph.ir.piece import Piece
from onegraph.ir.region import Region
from onegraph.ir.target import Target
from onegraph.torch_compat import custom_hooks, inductor
from onegraph.torch_compat.graph_text import graph_text


def piece_key(piece: Piece, region: Region | None, target: Target, options: dict[str, Any]) -> Key | Unkeyable:
    """The key of the artifact that `compilers.inductor` makes of the piece, or why it can't be stored.

    `options` are the Inductor options in force for this compile. Takes milliseconds; runs no compiler.
    """
    text = graph_text(piece.graph_module, piece.fake_mode.shape_env)
    if isinstance(text, Unkeyable):
        return text
    hooks = custom_hooks.hook_identities()
    if isinstance(hooks, str):
        return Unkeyable(hooks)
    factors = {
        "graph": hashlib.sha256(text.encode()).hexdigest(),
        "region": None if region is None else _without_names(region),
        "compiler": {"name": "inductor", "hooks": hooks, "config": inductor.portable_config(options)},
        "onegraph": {"version": onegraph.version.__version__, "code": own_code_digest()},
        "python": f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor}",
        **machine_factors(target),
    }
    return Key.of(factors, graph=text)


def _without_names(region: Region) -> dict[str, Any]:
    """Names of dims don't reach the compiler, so two models that name them differently share artifacts."""
    return {
        "ranges": [[lower, upper] for _, lower, upper in region.ranges],
        "hints": [hint for _, hint in region.hints],
        "predicate": region.predicate,
    }


@cache
def own_code_digest() -> str:
    """The digest of our own code that turns a graph into an artifact: an edit of it never meets old artifacts."""
    root = Path(onegraph.version.__file__).parent
    digest = hashlib.sha256()
    for folder in ("compilers", "targets", "torch_compat", "ops"):
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".cpp", ".h"):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
