"""Which passes run, in which order: onegraph's own by level, and those of users, with what the configuration says.

Takes a ResolvedConfig. Gives the passes with their options, and those that were asked for by name.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from onegraph.config.resolve import ResolvedConfig
from onegraph.errors import ConfigError, nearest
from onegraph.ir.passes import BorderPass, Pass, PassRun
from onegraph.passes.canonicalise_norms import CanonicaliseNorms
from onegraph.passes.fuse_rotary import FuseRotary
from onegraph.passes.merge_linears import MergeLinears
from onegraph.passes.move_rotary import MoveRotary
from onegraph.passes.remove_dead_code import RemoveDeadCode
from onegraph.passes.remove_no_ops import RemoveNoOps
from onegraph.passes.select_linear_kernels import SelectLinearKernels

ENTRY_POINTS = "onegraph.passes"
IF_PRESENT = "if_present"
"""Among a pass's options: that it matches nowhere is no error."""


@dataclass(frozen=True)
class _Entry:
    """A pass of ours: `canonical` ones run at -O1 too."""

    kind: type[Any]
    canonical: bool = False


CATALOGUE: tuple[_Entry, ...] = (
    _Entry(RemoveNoOps, canonical=True),
    _Entry(CanonicaliseNorms, canonical=True),
    _Entry(FuseRotary),
    _Entry(MergeLinears),
    _Entry(SelectLinearKernels),
    _Entry(RemoveDeadCode, canonical=True),
    _Entry(MoveRotary),
)
"""In the order in which they run; those of borders run after all others."""


@dataclass(frozen=True)
class ChosenPasses:
    """`passes` in order; `asked` are the names of those that must rewrite something somewhere."""

    passes: tuple[Pass | BorderPass, ...]
    asked: frozenset[str]


def choose_passes(config: ResolvedConfig) -> ChosenPasses:
    """The passes of users first, since they know the model's own operations, then those of the level.

    Raises ConfigError for a pass or an option that there isn't.
    """
    kinds: dict[str, type[Any]] = {}
    by_level: set[str] = set()
    for path in config.extra_passes:
        kind = _loaded(path)
        if kind.name in kinds or any(kind.name == entry.kind.name for entry in CATALOGUE):
            raise ConfigError(f"there are two passes of the name {kind.name!r}", where=f"extra_passes: {path}")
        kinds[kind.name] = kind
    users = frozenset(kinds)
    for entry in CATALOGUE:
        kinds[entry.kind.name] = entry.kind
        if config.level >= 2 or (entry.canonical and config.level >= 1):
            by_level.add(entry.kind.name)
    for name in config.passes:
        if name not in kinds:
            raise ConfigError(f"there is no pass {name!r}", where="passes", hint=nearest(name, kinds))
    passes, asked = [], set()
    for name, kind in kinds.items():
        said = config.passes.get(name, name in users or name in by_level)
        if not isinstance(said, bool | Mapping):
            raise ConfigError(f"passes.{name}={said!r}", where="passes", hint="it takes true, false, or its options")
        if said is False:
            continue
        options = dict(said) if isinstance(said, Mapping) else {}
        if_present = options.pop(IF_PRESENT, False)
        if not isinstance(if_present, bool):
            raise ConfigError(f"{IF_PRESENT}={if_present!r}", where=f"passes.{name}", hint="it takes true or false")
        if not if_present and (name in users or name in config.passes):
            asked.add(name)
        passes.append(_made(name, kind, options))
    return ChosenPasses(tuple(passes), frozenset(asked))


def refuse_missed(chosen: ChosenPasses, runs: Iterable[PassRun]) -> None:
    """Raises ConfigError for a pass that was asked for and rewrote nothing, with where it nearly did."""
    runs = list(runs)
    for name in sorted(chosen.asked):
        mine = [run for run in runs if run.name == name]
        if any(run.rewrites for run in mine):
            continue
        skipped = next((run.skipped for run in mine if run.skipped), None)
        misses = dict.fromkeys(miss for run in mine for miss in run.near_misses)
        told = [f"{miss.why}{f' ({miss.where})' if miss.where else ''}" for miss in list(misses)[:3]]
        raise ConfigError(
            f"the pass {name} was asked for, and it matches nowhere"
            + (f": {skipped}" if skipped else f"; nearly: {'; '.join(told)}" if told else ""),
            where=f"passes.{name}",
            hint=f"leave it out, or say passes.{name}={{{IF_PRESENT!r}: true}}",
        )


def _loaded(path: str) -> type[Any]:
    """The class at `module:Class`, or that of an entry point of the group `onegraph.passes`."""
    module, separator, qualname = path.partition(":")
    try:
        if separator:
            kind: Any = importlib.import_module(module)
            for part in qualname.split("."):
                kind = getattr(kind, part)
        else:
            points = entry_points(group=ENTRY_POINTS)
            if path not in points.names:
                known = ", ".join(sorted(points.names)) or "none"
                raise ConfigError(
                    f"extra_passes has {path!r}, which is no entry point of {ENTRY_POINTS} (there are: {known})",
                    where="extra_passes",
                    hint="give module:Class, or install the package that declares it",
                )
            kind = points[path].load()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the pass {path!r} can't be imported: {type(error).__name__}: {error}",
            where="extra_passes",
            hint="give module:Class of a module that Python finds (PYTHONPATH)",
        ) from error
    fits = isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if not (fits and isinstance(getattr(kind, "name", None), str) and callable(getattr(kind, "apply", None))):
        raise ConfigError(
            f"{path!r} is no pass: a frozen dataclass with a class attribute `name` and a method `apply`",
            where="extra_passes",
            hint="docs/passes.md has an example",
        )
    found: type[Any] = kind
    return found


def _made(name: str, kind: type[Any], options: dict[str, Any]) -> Pass | BorderPass:
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise ConfigError(
                f"the pass {name} has no option {option!r}",
                where=f"passes.{name}",
                hint=nearest(str(option), [*known, IF_PRESENT]),
            )
    try:
        made: Pass | BorderPass = kind(**options)
        return made
    except Exception as error:
        raise ConfigError(f"the pass {name} doesn't take {options}: {error}", where=f"passes.{name}") from error
