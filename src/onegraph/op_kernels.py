"""A target's kernels for onegraph's own ops: built once, kept in the store, put before the references.

`ops/` has each op's reference and knows no device; `targets/` has a device's kernels and knows no store. Here the two
meet: the library is loaded from the store, or built and kept there, and its functions are registered with torch's
dispatcher, which from then on prefers them for tensors of that device. So every caller of an op gets them, compiled
or eager, and whatever they don't do falls back to the reference inside. Once in a process for each target; where they
can't be had the references stay, with the reason.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from onegraph.counters import counters
from onegraph.errors import CompileError
from onegraph.ir.artifact import Artifact
from onegraph.ir.key import Key
from onegraph.ir.target import KernelBuild, Target
from onegraph.log import get_logger
from onegraph.ops.library import LIBRARY, implement
from onegraph.store.store import Store, outside_the_store
from onegraph.timeline import timeline

log = get_logger(__name__)

Implementations = Mapping[str, Callable[..., Any]]

_LOCK = threading.Lock()
_installed: dict[str, OpKernels] = {}
_begun: dict[str, _Installation] = {}


@dataclass(frozen=True)
class OpKernels:
    """What runs the ops on a target: `is_installed`, or the references with the reason in `why`.

    `store` is `hit`, `miss` or `off`, as for pieces; `seconds` is what its caller waited for it; `kind` says what the
    target's kernels are.
    """

    is_installed: bool
    store: str
    why: str
    seconds: float
    kind: str = "C++ kernel"

    @property
    def notes(self) -> tuple[str, ...]:
        """The downgrade, if it is one."""
        return () if self.is_installed else (f"onegraph's ops are plain PyTorch, not the {self.kind}: {self.why}",)


@contextlib.contextmanager
def op_kernels_begun(target: Target, store: Store | None) -> Iterator[None]:
    """Has the kernels built beside the caller, so that `install_op_kernels` waits less; not while another process does.

    A build that nobody has waited for is given up at the end, with the lock that other processes wait for. Never
    raises CompileError.
    """
    begun: _Installation | None = None
    name = _name(target)
    with _LOCK, contextlib.suppress(_BuiltElsewhereError):
        if name not in _installed and name not in _begun:
            begun = _begun[name] = _Installation(target, store, before_waiting=_give_up)
    try:
        yield
    finally:
        with _LOCK:
            if begun is not None and _begun.get(name) is begun:
                del _begun[name]
                begun.held.close()


def install_op_kernels(target: Target, store: Store | None) -> OpKernels:
    """Makes the target's kernels stand for the ops in this process; says how. Never raises CompileError.

    `store` None means that nothing is read or written. Later calls change nothing. For a target that doesn't run they
    are built and kept, and this process has what it had.
    """
    name = _name(target)
    with _LOCK:
        if name not in _installed:
            with timeline.stage("kernels", target.op_kernels_kind):
                begun = _begun.pop(name, None) or _Installation(target, store)
                _installed[name] = begun.finish()
        return _installed[name]


def op_kernels_key(target: Target) -> Key:
    """The key of the library of a target's kernels."""
    return Key.of({"op_kernels": target.op_kernel_factors(), "target": target.name})


def uses_own_ops(graph_module: torch.fx.GraphModule) -> bool:
    """Whether a graph, or a graph inside it, calls an op of onegraph's."""
    graphs = (module.graph for module in graph_module.modules() if isinstance(module, torch.fx.GraphModule))
    return any(str(node.target).startswith(f"{LIBRARY.ns}.") for graph in graphs for node in graph.nodes)


def _name(target: Target) -> str:
    """The same for targets that share one installation."""
    return target.name if target.runs else f"{target.name} {op_kernels_key(target).digest}"


class _BuiltElsewhereError(Exception):
    """Another process builds these kernels."""


def _give_up() -> None:
    raise _BuiltElsewhereError


class _Installation:
    """Kernels that were found in the store, or are being built; the key's lock is held until it is finished.

    Who waits for that lock holds no other, so that nobody waits for ever: see `PieceCompiler`.
    """

    def __init__(self, target: Target, store: Store | None, before_waiting: Callable[[], None] = lambda: None) -> None:
        self.target, self.store = target, store
        self.seconds = 0.0
        self.held = contextlib.ExitStack()
        self.build: KernelBuild | None = None
        self.error: CompileError | None = None
        self.found: tuple[Implementations, str] | None = None
        with self._timed():
            try:
                self._begin(before_waiting)
            except CompileError as error:
                self.error = error

    def _begin(self, before_waiting: Callable[[], None]) -> None:
        self.key = op_kernels_key(self.target)
        if self.store is not None:
            self.held.enter_context(self.store.lock(self.key.digest, before_waiting))
            stored = self.store.read(self.key.digest)
            if stored is not None:
                try:
                    made = self.target.load_op_kernels(stored.files)
                except Exception as error:  # noqa: BLE001 - whatever is wrong with stored code, building anew mends it
                    reason = f"it can't be loaded: {type(error).__name__}: {error}"
                    self.store.quarantine(self.key.digest, reason)
                else:
                    self.found = made, f"loaded; built on {stored.manifest.created}"
                    return
        self.build = self.target.start_op_kernels_build()
        self.held.callback(self.build.cancel)

    def finish(self) -> OpKernels:
        """Waits for the build; registers what was found or built."""
        try:
            with self._timed(), self.held:
                made, status, why = self._finished()
        except CompileError as error:
            counters.add("op_kernels_missing")
            none = OpKernels(False, "off", str(error).splitlines()[0], self.seconds, self.target.op_kernels_kind)
            log.warning("%s", none.notes[0])
            return none
        for name, implementation in made.items() if self.target.runs else ():
            implement(name, self.target.dispatch_key, implementation)
        return OpKernels(True, status, why, self.seconds, self.target.op_kernels_kind)

    def _finished(self) -> tuple[Implementations, str, str]:
        if self.error is not None:
            raise self.error
        if self.found is not None:
            return self.found[0], "hit", self.found[1]
        assert self.build is not None
        files = self.build.files()
        if self.store is None:
            return self._load_unkept(files), "off", "built; the compile cache is off"
        try:
            kept = self.store.write(Artifact(self.key, files, seconds=self.seconds))
        except OSError as error:
            log.warning("the attention kernel couldn't be kept in %s: %s", self.store.root, error)
            return self._load_unkept(files), "off", f"built; {self.store.root} can't be written"
        return self.target.load_op_kernels(kept.files), "miss", "built"

    def _load_unkept(self, files: Mapping[str, bytes]) -> Implementations:
        with outside_the_store(files) as paths:
            return self.target.load_op_kernels(paths)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Adds to the seconds that the caller has waited."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started
