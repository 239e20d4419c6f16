"""An Outcome is what one build handed to the compiler, under which keys, and what the index knows of it.

Takes a BuildCall, whose module is traced, split and rewritten once more; nothing is compiled, and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from onegraph.audit.witness import Handed, Witness
from onegraph.build_call import BuildCall, Stages
from onegraph.build_record import BuildRecord
from onegraph.built import Built
from onegraph.capture.portable import loaded
from onegraph.capture.trace_record import TraceDiffersError, revive_trace
from onegraph.config.compilation import CompilationMode
from onegraph.ir.key import Key, Unkeyable
from onegraph.ir.ledger import StateRead
from onegraph.pipeline import trace_and_compile
from onegraph.warm_start import index_key

COMPILING = (CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.ONEGRAPH)


@dataclass(frozen=True)
class Outcome:
    """`handed` are the pieces; `index` is the key under which the trace is looked up, `trace` what is kept there.

    Without a `trace`, `unkept` says why no later process can take the build.
    """

    handed: tuple[Handed, ...]
    index: Key | Unkeyable
    trace: bytes | None
    unkept: str
    built: Built | None


def outcome(call: BuildCall) -> Outcome:
    """Builds. Raises what building raises."""
    assert call.store is not None
    witness = Witness(call.store.root, call.store.base, call.store.signer)
    call = replace(call, store=witness, stages=Stages())
    if call.config.mode not in COMPILING:
        return Outcome((), Unkeyable("nothing of ours is compiled"), None, "nothing of ours is compiled", None)
    index = index_key(call)
    built = trace_and_compile(call, index, None)
    shown = built.explanation.index
    return Outcome(tuple(witness.handed), index, witness.trace, "" if shown is None else shown.why, built)


def asked_again(base: Outcome, call: BuildCall) -> Outcome:
    """The base's pieces under the settings that are in force now, for those that capture doesn't read; twins once."""
    handed = {one.key: one for one in reversed(base.handed) if one.key is not None}
    return replace(base, handed=tuple(one.ask_again() for one in handed.values()), index=index_key(call), trace=None)


def warm_start(base: Outcome, call: BuildCall, *, same_state: bool = False) -> str | None:
    """Why a later process would not take the base's trace for this call; None if it would.

    With `same_state` nothing that a trace reads has changed since the base.
    """
    if base.trace is None:
        return f"no trace is kept: {base.unkept}"
    index = index_key(call) if call.config.mode in COMPILING else Unkeyable("nothing of ours is compiled")
    if isinstance(index, Unkeyable):
        return index.reason
    if not isinstance(base.index, Key) or index.digest != base.index.digest:
        return "another key"
    try:
        if not same_state:
            revived_reads(base, call)
    except TraceDiffersError as error:
        return str(error)
    return None


def revived_reads(base: Outcome, call: BuildCall) -> Sequence[StateRead]:
    """The checks of the base's trace, as a later process would make them on the objects. Raises TraceDiffersError."""
    if base.trace is None:
        return ()
    record: BuildRecord = loaded(base.trace)
    reads: list[StateRead] = []
    for region in record.regions:
        trace = revive_trace(
            region.trace,
            call.module,
            call.args,
            call.kwargs,
            dynamic_shapes=call.dynamic_shapes,
            max_size=call.config.max_num_tokens,
            required_alignment=call.target.required_alignment,
        )
        reads += trace.call.state
    return reads
