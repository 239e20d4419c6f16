"""A module that isn't compiled, recorded whole: a plan of one call, which runs the module.

Takes a call whose mode captures nothing, and a recorder. The module is run once, watched: what it writes, which tensors
it reads, and what it returns. Later calls that are like the first (the same structure, constants, dtypes and sizes
without a declared dim) go through the same `Recordings` as compiled graphs; any other runs the module as it is.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from onegraph.build_call import BuildCall
from onegraph.built import Built
from onegraph.capture.inputs import CallInputs, Leaf, read_call
from onegraph.capture.signatures import call_signature
from onegraph.capture.sized_arguments import sized_arguments
from onegraph.counters import counters
from onegraph.cudagraph.graph import RecordedGraph, recorded_graph
from onegraph.cudagraph.recordings import Recordings
from onegraph.errors import ConfigError, RecordingError
from onegraph.explanation import Explanation
from onegraph.ir.dims import SizedArgument
from onegraph.ir.plan import ExecutionPlan, PlanCall
from onegraph.ir.recording import NotRecordableError, Recorder
from onegraph.plan.function import plan_function
from onegraph.plan.slots import allocate_slots
from onegraph.torch_compat import pytree
from onegraph.torch_compat.recordable import storage_key
from onegraph.torch_compat.watched_run import WatchedRun
from onegraph.watched_module import WatchedModule

_NOT_USERS = tuple(os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))
_PLAIN = (torch.Tensor, bool, int, float, str, type(None))
"""What a recorded call may return, in nested lists, tuples, dicts and what transformers registers like them."""


def build_uncompiled(call: BuildCall, recorder: Recorder, explanation: Explanation, *, restores: bool) -> Built:
    """The module behind recordings. With `restores`, what its first run changes has its values back afterwards.

    Raises ConfigError and RecordingError for a call that can't be recorded, and what the module raises.
    """
    signature, max_size = call_signature(call.module), call.config.max_num_tokens
    inputs = read_call(signature, call.args, call.kwargs, call.dynamic_shapes, max_size, sizing=None)
    arguments = Arguments(inputs, call.args, call.kwargs)
    with call.stages.stage("watch"), torch.no_grad():
        run = WatchedRun(restores=restores)
        try:
            with run:
                result = call.module(*call.args, **call.kwargs)
        finally:
            run.undo()
    watched = WatchedModule(call.module)
    _watch_others(watched, run, arguments)
    piece = _Module(call.module, arguments, result)
    sized = tuple(sized_arguments(inputs, {}, {}))
    graph = _graph(watched, arguments, sized, piece, run)
    recordings = Recordings.configured(graph, recorder, call.config)
    return Built(
        _Entry(call.module, arguments, watched, recordings, piece),
        replace(explanation, dims=inputs.dims, stages=call.stages.totals(), device=call.target.name),
        holds=None if call.config.freeze else watched.holds,
        changes=watched.changes,
        slots=functools.partial(allocate_slots, sized, inputs.dims),
        recordings=(recordings,),
    )


class Arguments:
    """How the arguments of a call become flat tensors, and whether a call is like the first one."""

    def __init__(self, inputs: CallInputs, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._signature = inputs.signature.written
        self.dims = inputs.dims
        self.values, self.spec = self._flat(args, kwargs)
        self.indices = [i for i, one in enumerate(self.values) if isinstance(one, torch.Tensor)]
        by_tensor = {id(leaf.value): leaf for leaf in inputs.leaves if isinstance(leaf.value, torch.Tensor)}
        found = {id(self.values[i]) for i in self.indices}
        if lost := by_tensor.keys() ^ found:
            path = next((by_tensor[one].path for one in lost if one in by_tensor), "a tensor")
            raise ConfigError(
                f"{path} stands in an object whose tensors can't be followed from call to call",
                where="recording an uncompiled module",
                hint="pass it in a list, tuple or dict, or as an argument of its own",
            )
        self.leaves: list[Leaf] = [by_tensor[id(self.values[i])] for i in self.indices]
        self._devices = [leaf.value.device for leaf in self.leaves]

    def _flat(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
        """By position and name as the signature has it, however they are passed."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError:  # a decorator's own arguments
            given: Any = args, dict(kwargs)
        else:
            bound.apply_defaults()
            given = bound.args, bound.kwargs
        leaves, spec = pytree.tree_flatten(given)
        return leaves, spec

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[torch.Tensor], str | None]:
        """The call's tensors, and what of it isn't as in the first call, in words."""
        values, spec = self._flat(args, kwargs)
        if spec != self.spec:
            return [], "its arguments have another structure"
        found: list[torch.Tensor] = []
        sizes: dict[str, int] = {}
        leaves = zip(self.leaves, self._devices, strict=True)
        for value, first in zip(values, self.values, strict=True):
            if not isinstance(first, torch.Tensor):
                if type(value) is not type(first) or value != first:
                    return [], f"an argument is {value!r:.40}, and was {first!r:.40}"
                continue
            leaf, device = next(leaves)
            if (why := _differs(value, first, device, leaf, sizes)) is not None:
                return [], f"{leaf.path} {why}"
            found.append(value)
        return found, None

    def with_tensors(self, tensors: list[Any]) -> tuple[Any, Any]:
        """Arguments of the module: the first call's, with other tensors."""
        values = list(self.values)
        for index, tensor in zip(self.indices, tensors, strict=True):
            values[index] = tensor
        args, kwargs = pytree.tree_unflatten(values, self.spec)
        return args, kwargs

    def forget(self) -> None:
        """Lets go of the first call's tensors, but for their facts."""
        self.leaves = [replace(leaf, value=None) for leaf in self.leaves]
        for index in self.indices:
            one = self.values[index]
            if one.layout == torch.strided:
                self.values[index] = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")
            else:
                self.values[index] = one.to("meta")


def _differs(value: Any, first: torch.Tensor, device: torch.device, leaf: Leaf, sizes: dict[str, int]) -> str | None:
    if not isinstance(value, torch.Tensor):
        return f"is a {type(value).__name__}"
    if value.dtype is not first.dtype or value.device != device or value.layout != first.layout:
        return f"is {value.dtype} on {value.device}"
    if not leaf.dims:
        return None if value.shape == first.shape and value.stride() == first.stride() else "lies otherwise"
    if value.dim() != first.dim():
        return "has another rank"
    for index, size in enumerate(value.shape):
        dim = leaf.dims.get(index)
        if dim is None and size != first.shape[index]:
            return f"has {size} in dim {index}"
        if dim is not None and not (dim.min <= size <= dim.max and sizes.setdefault(dim.name, size) == size):
            return f"has {dim.name} = {size}"
    return None


def _watch_others(watched: WatchedModule, run: WatchedRun, arguments: Arguments) -> None:
    """Finds where tensors stand that the module read, and that are neither its own nor arguments."""
    known = {storage_key(one) for one in watched.tensors() if one.layout == torch.strided}
    known |= {storage_key(leaf.value) for leaf in arguments.leaves if leaf.value.layout == torch.strided}
    for key, tensor in run.used.items():
        if key not in known and not watched.watch(tensor):
            raise RecordingError(
                f"the module reads a tensor of {list(tensor.shape)}, {tensor.dtype}, and nothing tells when it is "
                "replaced: it is no argument, and no attribute of a module",
                where="recording an uncompiled module",
                hint="register it as a buffer, pass it as an argument, or give cudagraph_mode=NONE",
            )


class _Module:
    """The plan's only piece: the module, on flat inputs of which the last ones are its arguments.

    `line` is the user's line that did what can't be recorded.
    """

    def __init__(self, module: Any, arguments: Arguments, result: Any) -> None:
        self.line: str | None = None
        self._module = module
        self._arguments = arguments
        leaves, self.spec = pytree.tree_flatten(result)
        self.num_results = len(leaves)
        for leaf in leaves:
            if not isinstance(leaf, _PLAIN):
                raise RecordingError(
                    f"the module returns a {type(leaf).__name__}, whose tensors can't be found",
                    where="recording an uncompiled module",
                    hint="return tensors in lists, tuples or dicts, or give cudagraph_mode=NONE",
                )

    def __call__(self, inputs: list[Any]) -> list[Any]:
        num_tensors = len(self._arguments.indices)
        args, kwargs = self._arguments.with_tensors(inputs[len(inputs) - num_tensors :])
        inputs.clear()
        leaves: list[Any]
        try:
            leaves, spec = pytree.tree_flatten(self._module(*args, **kwargs))
        except NotRecordableError as error:
            self.line = _users_line(error)
            raise
        if spec != self.spec:
            raise RecordingError(
                "the module returns another structure than in its first call",
                where="recording an uncompiled module",
                hint="return the same structure for all sizes, or give cudagraph_mode=NONE",
            )
        return leaves


def _users_line(error: Exception) -> str | None:
    """The last place in a traceback that is neither torch's nor ours."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    found = next((one for one in frames if not one.filename.startswith((*_NOT_USERS, "<"))), None)
    return None if found is None else f"{found.filename}:{found.lineno}: {found.line}"


class _Entry:
    """Called like the module."""

    def __init__(
        self, module: Any, arguments: Arguments, watched: WatchedModule, recordings: Recordings, piece: _Module
    ) -> None:
        self._module = module
        self._arguments = arguments
        self._watched = watched
        self._recordings = recordings
        self._piece = piece
        arguments.forget()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(*args, **kwargs)
        tensors, why = self._arguments.of(args, kwargs)
        if why is not None:
            if self._recordings.is_asked():
                raise RecordingError(
                    f"this call can't be recorded, since it isn't like the first one: {why}",
                    where="record",
                    hint="declare sizes that change in dynamic_shapes",
                )
            counters.add("unrecorded_calls:other_arguments")
            return self._module(*args, **kwargs)
        results = self._recordings(*self._watched.tensors(), *tensors)
        return pytree.tree_unflatten(list(results), self._piece.spec)


def _graph(
    watched: WatchedModule, arguments: Arguments, sized: Sequence[SizedArgument], piece: _Module, run: WatchedRun
) -> RecordedGraph:
    weights = [f"w{i}" for i in range(len(watched.places))]
    given = [f"a{i}" for i in range(len(arguments.leaves))]
    expressions: dict[str, str] = {}
    for name, leaf in zip(given, arguments.leaves, strict=True):
        for index, dim in leaf.dims.items():
            expressions.setdefault(dim.name, f"{name}.shape[{index}]")
    tensors = [*watched.tensors(), *(leaf.value for leaf in arguments.leaves)]
    keys = [storage_key(one) if one.layout == torch.strided else None for one in tensors]
    names, results = (*weights, *given), tuple(f"r{i}" for i in range(piece.num_results))
    plan = ExecutionPlan(
        inputs=names,
        calls=(PlanCall(0, names, results, (), comment="the module, uncompiled"),),
        results=results,
        size=expressions[arguments.dims[0].name] if arguments.dims else None,
        symbols=expressions,
        written=frozenset(name for name, key in zip(names, keys, strict=True) if key in run.written),
    )
    function: Callable[..., Any] = plan_function(plan, [[piece]])
    return recorded_graph(
        plan,
        function,
        weights=[place.name for place in watched.places],
        input_names=[leaf.source for leaf in arguments.leaves],
        is_tensor=[True] * len(given),
        sized=sized,
        unrecordable={},
        user_line=lambda index, op: piece.line,
    )
