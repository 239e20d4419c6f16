"""Which kernel runs each linear layer of a graph: measured once for a machine, kept in the store, told to the op.

Takes a graph and its target; finds the calls of `onegraph::linear`, and for each distinct shape of a weight has the
kernels of the target's op timed, at several numbers of tokens. The choice lies in the op and not in the graph: graphs,
keys and artifacts are the same whatever is chosen, and one artifact serves all numbers of tokens.

Weights are timed as a model's are met, in memory rather than in the cache, by taking a different one for each run.
Kernels run in turns, and the least time counts, so that other load on the machine meets all of them alike; where it is
so busy that threads wait for each other, nothing is measured or kept, and the op's own rule stands for now. (One thread
has a clock of its own, which other load doesn't touch.) A kernel that isn't clearly faster than PyTorch's isn't chosen,
and neither is one whose results differ from PyTorch's.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from onegraph.counters import counters
from onegraph.ir.fx_nodes import value_of
from onegraph.ir.linear import PLAIN, TOKENS, LinearChoice, LinearOp, LinearShape
from onegraph.ir.target import Target
from onegraph.log import get_logger
from onegraph.ops.library import LIBRARY, implementation
from onegraph.store.linear_choices import LinearChoices
from onegraph.store.store import Store
from onegraph.timeline import timeline

log = get_logger(__name__)

CLEARLY_FASTER = 1.03
"""PyTorch's kernel stays, unless another one takes so much less time."""
POOL_BYTES = 64 << 20
"""Weights that take turns: far more than the caches of the cores hold. """
_PARTS = 4
"""A weight that is larger than such a part of them is measured in part: its rows are all alike."""
_MIN_ROUNDS, _MAX_ROUNDS = 3, 12
_ROUNDS_S = 0.008
"""After the fewest rounds, so long is measured on for one number of tokens."""
_CALM_S = 0.0005
"""Two threads that are running share a small loop in a few microseconds; on a busy machine, in milliseconds."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of the largest result: what a kernel may differ by from PyTorch's, which rounds as often as it does."""
_COMPARED_TOKENS = 16

_LOCK = threading.Lock()
_known: dict[str, LinearChoice] = {}
"""This process's choices by the digest of shape and machine."""


def choose_linear_kernels(
    graph_module: torch.fx.GraphModule, target: Target, store: Store | None
) -> tuple[LinearChoice, ...]:
    """Sees to it that the target's op has a choice for each weight in the graph; gives the choices.

    The target's kernels have to be installed (`op_kernels`); without them, and for dtypes that they don't run, there is
    nothing to choose. `store` None means that nothing is read or written. Must be called with no piece's lock held.
    """
    return choose_kernels_for(linear_shapes(graph_module, target), target, store)


def choose_kernels_for(wanted: Sequence[LinearShape], target: Target, store: Store | None) -> tuple[LinearChoice, ...]:
    """As `choose_linear_kernels`, for weights of these shapes. A target that doesn't run has nothing to measure yet."""
    op = implementation("linear", target.dispatch_key) if target.runs else None
    if not isinstance(op, LinearOp):
        return ()
    shapes = [shape for shape in wanted if len(op.kernels(shape.dtype)) > 1]
    if not shapes:
        return ()
    machine = {
        "target": target.name,
        **target.fingerprint(),
        "kernels": target.op_kernel_factors(),
    }
    digests = {shape: shape.digest(machine) for shape in shapes}
    with _LOCK:
        _find({shape: digest for shape, digest in digests.items() if digest not in _known}, op, machine, store)
        chosen = tuple(_known[digest] for digest in digests.values())
    for choice in chosen:
        op.choose(choice.shape, choice.kernels)
    return chosen


def linear_shapes(graph_module: torch.fx.GraphModule, target: Target) -> tuple[LinearShape, ...]:
    """The distinct shapes of weights on the target that `onegraph::linear` has in a graph, or in a graph inside it."""
    found: dict[LinearShape, None] = {}
    for module in graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if str(node.target).removesuffix(".default") != f"{LIBRARY.ns}.linear":
                continue
            weight = value_of(node.args[1] if len(node.args) > 1 else node.kwargs["weight"])
            known = all(isinstance(size, int) and size > 0 for size in weight.shape)
            if known and weight.dim() == 2 and weight.device.type == target.name:
                outputs, inputs = weight.shape
                found[LinearShape(outputs, inputs, weight.dtype)] = None
    return tuple(found)


def _find(wanted: Mapping[LinearShape, str], op: LinearOp, machine: Mapping[str, Any], store: Store | None) -> None:
    """Puts the choices among those that are known: read, or measured with the store's lock held."""
    records = None if store is None else LinearChoices(store)
    missing = dict(wanted)

    def read() -> None:
        for shape, digest in list(missing.items()):
            choice = None if records is None else records.read(digest)
            if choice is not None and choice.shape == shape and set(choice.kernels) <= set(op.kernels(shape.dtype)):
                _known[digest] = choice
                del missing[shape]

    read()
    if not missing:
        return
    with contextlib.nullcontext() if records is None else records.measuring():
        read()  # what another process has measured meanwhile
        with timeline.stage("kernels", "linear layers, measured"):
            for choice in measure(missing, op):
                _known[missing[choice.shape]] = choice
                counters.add("linear_shapes_measured", int(choice.is_measured))
                if records is not None and choice.is_measured:
                    records.keep(missing[choice.shape], choice, machine)
                log.info("%s", choice)


def measure(shapes: Iterable[LinearShape], op: LinearOp) -> Iterator[LinearChoice]:
    """Times the op's kernels for each shape, until the machine is too busy."""
    pools: dict[torch.dtype, torch.Tensor] = {}
    is_calm = True
    with torch.inference_mode():
        for shape in shapes:
            is_calm = is_calm and _threads_answer()
            if not is_calm or shape.inputs * TOKENS[-1] * shape.dtype.itemsize > 4 * POOL_BYTES:
                yield _unmeasured(shape, op)
                continue
            if shape.dtype not in pools:
                pools[shape.dtype] = _numbers(POOL_BYTES // shape.dtype.itemsize, shape.dtype)
            choice = _Measurement(shape, op, pools[shape.dtype]).choice()
            is_calm = _threads_answer()
            yield choice if is_calm else _unmeasured(shape, op)


def _unmeasured(shape: LinearShape, op: LinearOp) -> LinearChoice:
    return LinearChoice(shape, op.rule(shape.dtype), ({},) * len(TOKENS), 0)


def _clock() -> float:
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _threads_answer() -> bool:
    some, times = torch.ones(1 << 17), []
    for _ in range(9):
        started = _clock()
        some.add_(some)
        times.append(_clock() - started)
    return statistics.median(times) < _CALM_S


def _numbers(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Some random numbers, repeated: drawing all of them would take longer than measuring."""
    some = torch.randn((1 << 16) + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    return some.repeat(-(-count // len(some)))[:count]


@dataclass
class _Measurement:
    shape: LinearShape
    op: LinearOp
    pool: torch.Tensor
    wrong: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        inputs = self.shape.inputs
        self.outputs = min(self.shape.outputs, self.pool.numel() // _PARTS // inputs)
        size = self.outputs * inputs
        self.weights = [
            self.pool[at : at + size].view(self.outputs, inputs) for at in range(0, self.pool.numel() - size + 1, size)
        ]
        self.next_weight = 0
        self.x = _numbers(TOKENS[-1] * inputs, self.shape.dtype).view(-1, inputs)
        self.out = self.x.new_empty(TOKENS[-1], self.outputs)

    def choice(self) -> LinearChoice:
        names = list(self.op.kernels(self.shape.dtype))
        seconds: list[dict[str, float]] = []
        late_before: set[str] = set()
        for tokens in TOKENS:
            times = self._times(tokens, [name for name in names if name not in self.wrong])
            best = min(times, key=times.__getitem__)
            before = seconds[-1] if seconds else times
            late = {name for name in times if times[name] > max(2 * times[best], 1.5 * before.get(name, 0.0))}
            for name in (late & late_before) - {PLAIN}:
                names.remove(name)  # it is limited by arithmetic already, and only falls behind
            late_before = late
            seconds.append(times)
        seconds = [{name: times[name] for name in times if name not in self.wrong} for times in seconds]
        for times, more in reversed(list(itertools.pairwise(seconds))):  # fewer tokens don't take longer
            times.update({name: min(value, more.get(name, value)) for name, value in times.items()})
        kernels = tuple(
            PLAIN if min(times.values()) * CLEARLY_FASTER >= times[PLAIN] else min(times, key=times.__getitem__)
            for times in seconds
        )
        whole = self.shape.outputs / self.outputs
        scaled = tuple({name: value * whole for name, value in times.items()} for times in seconds)
        return LinearChoice(self.shape, kernels, scaled, self.outputs)

    def _times(self, tokens: int, names: list[str]) -> dict[str, float]:
        """The least seconds of each kernel; those that give something else than PyTorch's are left out."""
        x, out, step = self.x[:tokens], self.out[:tokens], max(1, tokens // _COMPARED_TOKENS)
        expected = None
        for name in names:  # PLAIN is first
            self.op.run(name, x, self.weights[0], out)
            if expected is None:
                expected = out[::step].to(torch.float32, copy=True)
            elif not _are_near(out[::step].float(), expected, self.shape.dtype):
                self.wrong.add(name)
                counters.add("linear_kernels_wrong")
                log.warning(
                    "the kernel %s is left out: %s at %d tokens isn't what PyTorch gives", name, self.shape, tokens
                )
        times = {name: float("inf") for name in names if name not in self.wrong}
        began = _clock()
        for done in range(_MAX_ROUNDS):
            if done >= _MIN_ROUNDS and _clock() - began > _ROUNDS_S:
                break
            for name in times:
                weight = self.weights[self.next_weight % len(self.weights)]
                self.next_weight += 1
                started = _clock()
                self.op.run(name, x, weight, out)
                times[name] = min(times[name], _clock() - started)
        return times


def _are_near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    return bool((found - expected).abs().max() <= _TOLERANCE[dtype] * expected.abs().max())  # not where there is NaN
