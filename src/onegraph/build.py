"""A build: taken from the index, where an earlier process left one that is right here, or traced and compiled.

The index is looked at first, and without what tracing needs: Dynamo and Inductor take seconds to import.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onegraph.build_call import BuildCall, SavedBuild
from onegraph.built import Built
from onegraph.capture.trace_record import first_other_weight
from onegraph.compilers.machine import machine_factors
from onegraph.config.resolve import ResolvedConfig
from onegraph.errors import ArtifactError
from onegraph.explanation import Explanation
from onegraph.ir.key import Key, Unkeyable
from onegraph.ir.ledger import Ledger
from onegraph.ir.target import Target
from onegraph.store.index import Miss
from onegraph.store.lookup import Lookup
from onegraph.store.nearest import differences
from onegraph.timeline import timeline
from onegraph.warm_start import from_index, index_key

_TOLD = 6
"""So many differences are told of a saved build that isn't for this process."""


def build(call: BuildCall) -> Built:
    """Compiles the module for all calls like the given one, at any size in the declared ranges.

    Raises what the stages raise; a failed build leaves nothing behind but finished artifacts.
    """
    if isinstance(call.store, Lookup):
        call.store.begin(call)
        key: Key | Unkeyable = Unkeyable("the store is only looked at")
    else:
        key = index_key(call)
    if call.saved is not None:
        _refuse_other(call.saved, key, call.module)
    if isinstance(key, Unkeyable):
        return _traced(call, key, None)
    found = from_index(
        call,
        key.digest,
        lambda again: _traced(again, Unkeyable("a piece falls back to eager, which needs its graph"), None),
    )
    if not isinstance(found, Miss):
        return found
    if call.saved is not None:
        raise _other_than(call.saved, str(found))
    return _traced(call, key, found)


def refuse_other_machine(saved: SavedBuild, target: Target) -> None:
    """Raises ArtifactError for a machine, or a torch, that the saved build isn't for: before there is a module."""
    field = "machine"
    _refuse(saved, differences({field: saved.factors.get(field, {})}, {field: machine_factors(target)}))


def _refuse_other(saved: SavedBuild, key: Key | Unkeyable, module: Any) -> None:
    """Raises ArtifactError for a configuration or a machine that the saved build isn't for."""
    if isinstance(key, Unkeyable):
        raise _other_than(saved, key.reason)
    differs = differences(saved.factors, key.factors)
    _refuse(saved, (first_other_weight(saved.weights, module) if one.field == "tensors" else one for one in differs))


def _refuse(saved: SavedBuild, differs: Iterable[Any]) -> None:
    told = list(differs)
    if told:
        more = f", and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
        raise _other_than(saved, "; ".join(map(str, told[:_TOLD])) + more)


def _other_than(saved: SavedBuild, why: str) -> ArtifactError:
    return ArtifactError(
        f"{saved.file} isn't for this module, call or machine: {why}",
        where=saved.file,
        hint="save it again here, or use onegraph.compile, which traces and compiles anew",
    )


def _traced(call: BuildCall, key: Key | Unkeyable, miss: Miss | None) -> Built:
    with timeline.stage("import", "Dynamo and Inductor"):
        from onegraph.pipeline import trace_and_compile  # takes seconds to import

    return trace_and_compile(call, key, miss)


def empty_explanation(name: str, config: ResolvedConfig) -> Explanation:
    """What can be said before the first call, or of a mode that compiles nothing of ours."""
    return Explanation(model=name, config=config.to_dict(), ledger=Ledger())
