"""A target's kernels for onegraph's own ops: built once, kept in the store, put before the references.

`ops/` has each op's reference and knows no device; `targets/` has a device's kernels and knows no store. Here the two
meet: the library is loaded from the store, or built and kept there, and its functions are registered with torch's
dispatcher, which from then on prefers them for tensors of that device. So every caller of an op gets them, compiled
or eager, and whatever they don't do falls back to the reference inside. Once in a process for each target; where they
can't be had the references stay, with the reason.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from onegraph.counters import counters
from onegraph.errors import CompileError
from onegraph.ir.artifact import Artifact
from onegraph.ir.key import Key
from onegraph.ir.target import Target
from onegraph.log import get_logger
from onegraph.ops.library import LIBRARY, implement
from onegraph.store.store import Store

log = get_logger(__name__)

Implementations = Mapping[str, Callable[..., Any]]

_LOCK = threading.Lock()
_installed: dict[str, OpKernels] = {}


@dataclass(frozen=True)
class OpKernels:
    """What runs the ops on a target: `is_installed`, or the references with the reason in `why`.

    `store` is `hit`, `miss` or `off`, as for pieces; `seconds` is what building or loading took.
    """

    is_installed: bool
    store: str
    why: str
    seconds: float

    @property
    def notes(self) -> tuple[str, ...]:
        """The downgrade, if it is one."""
        return () if self.is_installed else (f"attention is plain PyTorch, not the C++ kernel: {self.why}",)


def install_op_kernels(target: Target, store: Store | None) -> OpKernels:
    """Makes the target's kernels stand for the ops in this process; says how. Never raises CompileError.

    `store` None means that nothing is read or written. Later calls change nothing.
    """
    with _LOCK:
        if target.name not in _installed:
            _installed[target.name] = _install(target, store)
        return _installed[target.name]


def uses_own_ops(graph_module: torch.fx.GraphModule) -> bool:
    """Whether a graph, or a graph inside it, calls an op of onegraph's."""
    graphs = (module.graph for module in graph_module.modules() if isinstance(module, torch.fx.GraphModule))
    return any(str(node.target).startswith(f"{LIBRARY.ns}.") for graph in graphs for node in graph.nodes)


def _install(target: Target, store: Store | None) -> OpKernels:
    started = time.perf_counter()
    try:
        made, status, why = _load_or_build(target, store)
    except CompileError as error:
        counters.add("op_kernels_missing")
        found = OpKernels(False, "off", str(error).splitlines()[0], time.perf_counter() - started)
        log.warning("%s", found.notes[0])
        return found
    for name, implementation in made.items():
        implement(name, target.dispatch_key, implementation)
    return OpKernels(True, status, why, time.perf_counter() - started)


def _load_or_build(target: Target, store: Store | None) -> tuple[Implementations, str, str]:
    if store is None:
        return _in_a_temporary_folder(target, target.build_op_kernels()), "off", "built; the compile cache is off"
    key = Key.of({"op_kernels": target.op_kernel_factors(), "target": target.name})
    with store.lock(key.digest):
        stored = store.read(key.digest)
        if stored is not None:
            try:
                made = target.load_op_kernels(stored.files)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with stored code, building anew mends it
                store.quarantine(key.digest, f"it can't be loaded: {type(error).__name__}: {error}")
            else:
                return made, "hit", f"loaded; built on {stored.manifest.created}"
        started = time.perf_counter()
        files = target.build_op_kernels()
        try:
            kept = store.write(Artifact(key, files, seconds=time.perf_counter() - started))
        except OSError as error:
            log.warning("the attention kernel couldn't be kept in %s: %s", store.root, error)
            return _in_a_temporary_folder(target, files), "off", f"built; {store.root} can't be written"
        return target.load_op_kernels(kept.files), "miss", "built"


def _in_a_temporary_folder(target: Target, files: Mapping[str, bytes]) -> Implementations:
    with tempfile.TemporaryDirectory(prefix="onegraph-op-kernels-") as folder:
        paths = {name: Path(folder) / name for name in files}
        for name, contents in files.items():
            paths[name].write_bytes(contents)
        return target.load_op_kernels(paths)
