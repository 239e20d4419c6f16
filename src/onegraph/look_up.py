"""What the store has for a piece, without compiling; or beside a fresh compile of it, where that is asked for.

Compared are the code that was generated, and what it computes. The fresh artifact is neither read from the store nor
kept. Kernels are named by their source, so equal wrappers have equal kernels; the library that was built of them is
compared by what it computes on sample data.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import torch

from onegraph.compilers import eager, inductor
from onegraph.compilers.autotuning import Autotuning
from onegraph.compilers.loading import WRAPPER, load_artifact
from onegraph.compilers.shared_build import SharedBuild
from onegraph.ir.artifact import CompiledPiece, PieceCallable
from onegraph.ir.key import Key, Unkeyable
from onegraph.ir.piece import Piece
from onegraph.ir.target import Target
from onegraph.passes.check import sample_inputs
from onegraph.store.layer import StoredArtifact
from onegraph.store.lookup import Lookup, Recompiled
from onegraph.store.nearest import first_difference
from onegraph.store.store import outside_the_store
from onegraph.torch_compat import shapes

_NUMBER = re.compile(r"^# AOT ID: .*$", re.MULTILINE)
"""A comment that counts the graphs that torch has compiled in a process."""
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Of the largest result: sums of several threads may come in another order. Shorter floats: 2e-2."""


def looked_up(
    piece: Piece,
    key: Key | Unkeyable,
    store: Lookup,
    target: Target,
    options: dict[str, Any],
    tuning: Autotuning | None,
) -> CompiledPiece:
    """Says what the store has; the piece itself runs op by op. Nothing is compiled or written."""
    made = CompiledPiece(eager.compile_piece(piece), "inductor", "off", "", 0.0)
    if isinstance(key, Unkeyable):
        return replace(made, why=f"can't be stored: {key.reason}")
    recorded = key if tuning is None else tuning.recorded_key(key)
    stored = None if recorded is None else store.read(recorded.digest)
    found = recorded or key
    store.asked[found.digest] = found
    made = replace(made, key=found.digest)
    if stored is None:
        return replace(made, store="miss", why=store.why_missed(found))
    if not guards_hold(piece, stored.manifest.guards):
        return replace(made, store="stale", why="the conditions on sizes under which it is right don't hold")
    store.found(lambda: recompiled(piece, stored, target, options, tuning))
    return replace(made, store="hit", why=as_on(stored.manifest.created))


def guards_hold(piece: Piece, guards: str | None) -> bool:
    """Whether an artifact's conditions, as torch wrote them, hold for the sizes of the piece's inputs."""
    return guards is None or shapes.holds(piece.fake_mode.shape_env, guards, shapes.backed_inputs(piece.fake_inputs))


def as_on(created: str) -> str:
    """Why an artifact is a hit."""
    return f"same graph, options and machine as on {created}"


def recompiled(
    piece: Piece, stored: StoredArtifact, target: Target, options: dict[str, Any], tuning: Autotuning | None
) -> Recompiled:
    """Compiles the piece with these options and compares. Must run inside `torch_compat.dynamo.compile_scope`."""
    began = time.perf_counter()
    compilation = inductor.Compilation(piece, target, options, tuning)
    made = compilation.finish(None, SharedBuild(target, [compilation]).files_for(compilation))
    seconds = time.perf_counter() - began
    key = stored.manifest.key
    if isinstance(made, inductor.InProcess):
        return Recompiled(piece.index, key, seconds, None, f"compiled afresh it can't be stored: {made.reason}")
    was = _NUMBER.sub("", stored.files[WRAPPER].read_text())
    now = _NUMBER.sub("", made.files[WRAPPER].decode())
    if was != now:
        old, new = first_difference(was, now)
        return Recompiled(piece.index, key, seconds, None, f"the generated code has {new!r} where {old!r} is stored")
    with outside_the_store(made.files) as files:
        fresh = load_artifact(files, made, target)
    kept = load_artifact(stored.files, stored.manifest, target)
    try:
        wanted, found = _results(fresh, piece), _results(kept, piece)
    except Exception:  # noqa: BLE001 - whatever an op says of data that means nothing to it
        return Recompiled(piece.index, key, seconds, None, None)
    worst, problem = 0.0, None
    for number, (one, other) in enumerate(zip(wanted, found, strict=True)):
        difference, allowed = _difference(one, other)
        worst = max(worst, difference)
        if not difference <= allowed:
            problem = f"its value {number} on sample data is off by {difference:.2g}, and {allowed:.2g} is allowed"
    return Recompiled(piece.index, key, seconds, worst, problem)


def _results(call: PieceCallable, piece: Piece) -> list[torch.Tensor]:
    """The outputs, and the inputs as the call left them."""
    inputs = sample_inputs(piece)
    given = [one for one in inputs if isinstance(one, torch.Tensor)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = call(inputs)
    return [one for one in (*outputs, *given) if isinstance(one, torch.Tensor)]


def _difference(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """The largest difference, and the largest that is allowed."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return float("inf"), 0.0
    if not one.is_floating_point():
        return float(not torch.equal(one, other)), 0.0
    wide, found = one.double(), other.double()
    unlike = torch.where((wide == found) | (wide.isnan() & found.isnan()), 0.0, (wide - found).abs())
    scale = wide.nan_to_num(posinf=0.0, neginf=0.0).abs()
    most, largest = (float(each.max()) if each.numel() else 0.0 for each in (unlike, scale))
    return most, largest * _TOLERANCE.get(one.dtype, 2e-2)
