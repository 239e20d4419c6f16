"""Saves a build: all of its entries in the store, as one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from onegraph.build_call import BuildCall
from onegraph.errors import ArtifactError
from onegraph.explanation import Explanation
from onegraph.op_kernels import op_kernels_key
from onegraph.store.transfer import export


def saving(call: BuildCall, trace: str | None, explanation: Explanation, uses_own_ops: bool) -> Callable[[Path], None]:
    """Writes a build to a file: its trace, the artifacts of its pieces, and the kernels of ops.

    The function raises ArtifactError where the index couldn't keep the build.
    """
    store, target = call.store, call.target

    def save(file: Path) -> None:
        if store is None or trace is None:
            why = "the compile cache is off" if explanation.index is None else explanation.index.why
            raise ArtifactError(f"this build can't be saved: {why}", where=str(file))
        keys = [trace, *(one.key for piece in explanation.pieces for one in piece.ranges if one.key is not None)]
        kernels = op_kernels_key(target).digest
        if uses_own_ops and any(layer.entry(kernels).exists() for layer in store.layers):
            keys.append(kernels)
        export(store, file, list(dict.fromkeys(keys)))

    return save
