"""Custom ops, checked once: on the values of the first real call, before any result is returned.

Takes a captured graph; gives a record for each op in it that is neither torch's nor ours, and a callable that
checks them when it is first called with data. A compiler believes an op's schema and its fake: what the op changes
or shares without saying so, and a result that its fake doesn't describe, make wrong results elsewhere. The check
runs the graph up to its last custom op, op by op, on clones: the caller's tensors, the weights and the random
generators stay as they are, but a custom op's Python runs one time more than in eager.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch

from onegraph.capture.constraints import source_line
from onegraph.errors import CustomOpError
from onegraph.ir.custom_op import CustomOp
from onegraph.ir.graph import GraphCallable
from onegraph.opaque_ops import is_own_frame
from onegraph.ops.memory import clone_together, same_bytes, share_memory
from onegraph.torch_compat import fake_runs, operators, shapes

_NOT_FOREIGN = frozenset(
    (
        *("onegraph", "aten", "prim", "prims", "rngprims", "debugprims", "inductor", "inductor_prims", "higher_order"),
        *("quantized", "_quantized", "quantized_decomposed", "sparse", "mkl", "mkldnn", "mkldnn_prepacked", "onednn"),
        *("xnnpack", "static_runtime", "profiler", "streams", "c10d", "c10d_functional", "_c10d_functional"),
        *("_c10d_functional_autograd", "symm_mem", "fsdp", "_dtensor", "_native", "export", "onnx", "onnx_symbolic"),
        "flex_lib",
    )
)
"""Our namespace, and those of torch itself in the supported versions."""


def custom_ops(graph_module: torch.fx.GraphModule) -> tuple[CustomOp, ...]:
    """A record for each custom op in the graph and in the graphs nested in it, in order of first use."""
    found: dict[str, CustomOp] = {}
    for module in graph_module.modules():
        for node in _foreign_nodes(module) if isinstance(module, torch.fx.GraphModule) else ():
            found.setdefault(_name(node.target), CustomOp(_name(node.target), user_line(node)))
    return tuple(found.values())


def checked_at_first_call(
    call: GraphCallable, graph_module: torch.fx.GraphModule, ops: tuple[CustomOp, ...], further: slice = slice(0, 0)
) -> GraphCallable:
    """`call` itself where there is nothing to check; else a function that checks first, once.

    `call` and `graph_module` take the same flat inputs, but for `further` ones that only `call` takes; the graph's
    nodes carry their fake values. A call without data (meta tensors) leaves the ops pending; so is an op that stands
    only in a nested graph (a branch of torch.cond). The function raises CustomOpError, on every call until the op is
    mended.
    """
    if not any(True for _ in _foreign_nodes(graph_module)):
        return call
    checking = threading.Lock()
    pending: list[torch.fx.GraphModule] = [graph_module]

    def run(*inputs: Any) -> Any:
        if pending and not any(isinstance(value, torch.Tensor) and value.is_meta for value in inputs):
            with checking:
                if pending:
                    names = _check(pending[0], (*inputs[: further.start], *inputs[further.stop :]))
                    for op in ops:
                        op.checked |= op.name in names
                    pending.clear()
        return call(*inputs)

    return run


def _foreign_nodes(graph_module: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    for node in graph_module.graph.nodes:
        is_op = isinstance(node.target, operators.OpOverload | operators.OpOverloadPacket)
        if is_op and _name(node.target).split("::")[0] not in _NOT_FOREIGN:
            yield node


def _name(op: Any) -> str:
    """`namespace::op`, without the overload."""
    packet = op.overloadpacket if isinstance(op, operators.OpOverload) else op
    return str(packet._qualified_op_name)


def user_line(node: torch.fx.Node) -> str | None:
    """The innermost `file:line` of the call that is neither torch's nor that of `onegraph.opaque`."""
    frames = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    users = [f"{file}:{line}" for file, line in frames if not (shapes.is_torch_file(file) or is_own_frame(file))]
    return users[-1] if users else None


def _check(graph_module: torch.fx.GraphModule, inputs: tuple[Any, ...]) -> frozenset[str]:
    """Runs the graph as far as needed; gives the names of the ops that were checked. Raises CustomOpError.

    A model's weights and caches are too big to clone all of them: what nothing writes stands in the run as it is.
    What something writes is found by the first op that is about to write it; then the run starts again with clones
    of that input and of all of its kind, as the caches of other layers.
    """
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    written: set[Any] = set()
    if any(isinstance(node.target, operators.HigherOrderOperator) for node in graph_module.graph.nodes):
        written = {_facts(tensor) for tensor in tensors}  # their bodies can't be watched
    while True:
        originals = [tensor for tensor in tensors if _facts(tensor) not in written]
        with ExitStack() as scope:
            _keep_generators(scope, tensors)
            scope.enter_context(torch.no_grad())
            if originals:
                scope.enter_context(operators.refuse_writes(originals))
            try:
                return _CheckedRun(graph_module, originals).check(inputs)
            except operators.WriteRefusedError as refused:
                written |= {_facts(tensor) for tensor in originals if share_memory(tensor, refused.tensor)}


def _keep_generators(scope: ExitStack, tensors: Iterable[torch.Tensor]) -> None:
    """Random numbers that the check draws are drawn again by the call."""
    scope.enter_context(torch.random.fork_rng(devices=[]))
    for device in {tensor.device for tensor in tensors if tensor.device.type != "cpu"}:
        index = [] if device.index is None else [device.index]
        scope.enter_context(torch.random.fork_rng(devices=index, device_type=device.type))


class _CheckedRun(torch.fx.Interpreter):
    """One run of the graph on clones. `originals` are the inputs that stand in it as they are."""

    def __init__(self, graph_module: torch.fx.GraphModule, originals: list[torch.Tensor]) -> None:
        super().__init__(graph_module)
        self.originals = originals
        self.foreign = list(_foreign_nodes(graph_module))
        self.sizes: dict[Any, int] = {}
        self.seen: set[Any] = set()

    def check(self, inputs: tuple[Any, ...]) -> frozenset[str]:
        kept = {id(tensor) for tensor in self.originals}
        tensors = [value for value in inputs if isinstance(value, torch.Tensor) and id(value) not in kept]
        clones = {id(tensor): clone for tensor, clone in zip(tensors, clone_together(tensors), strict=True)}
        self.args_iter = iter([clones.get(id(value), value) for value in inputs])
        for node, value in zip(self.module.graph.find_nodes(op="placeholder"), inputs, strict=True):
            fake_runs.bind_symbols(_fake(node), value, self.sizes)
        for node in self.module.graph.nodes:
            self.env[node] = self.run_foreign(node) if node in self.foreign else self.run_node(node)
            for dead in self.user_to_last_uses.get(node, ()):
                self.env.pop(dead, None)
            if node is self.foreign[-1]:
                break
        return frozenset(_name(node.target) for node in self.foreign)

    def run_foreign(self, node: torch.fx.Node) -> Any:
        """Runs the node's op on its values, and compares what it did with what it declares."""
        for source in node.all_input_nodes:
            fake_runs.bind_symbols(_fake(source), self.env[source], self.sizes)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        op = operators.overload_for(node.target, args, kwargs)
        declared = operators.written_arguments(op)
        named = operators.named_arguments(op, args, kwargs)
        for tensor in _tensors([value for name, value in named.items() if name in declared]):
            if any(share_memory(tensor, original) for original in self.originals):
                raise operators.WriteRefusedError(tensor)
        signature = (str(op), *map(_facts, _leaves((args, kwargs))), str(_fake(node)))
        if signature in self.seen:
            return op(*args, **kwargs)
        self.seen.add(signature)
        args, kwargs = self.without_originals(args, kwargs)
        given = [(n, t) for n, v in operators.named_arguments(op, args, kwargs).items() for t in _tensors(v)]
        written = [tensor for name, tensor in given if name in declared]
        kept = [(n, t) for n, t in given if not any(share_memory(t, w) for w in written)]
        before = clone_together([tensor for _, tensor in kept])
        try:
            result = op(*args, **kwargs)
        except RuntimeError as error:  # torch.library.custom_op looks at this itself
            if "may not alias" not in str(error):
                raise
            what = f"a result of {op} shares memory with an argument or with another result"
            raise self.mismatch(node, op, what, _RETURN) from error
        for (name, tensor), old in zip(kept, before, strict=True):
            if _facts(tensor) != _facts(old) or not same_bytes(tensor, old):
                what = f"{op} changes its argument {name!r}, and its schema doesn't say so"
                raise self.mismatch(node, op, what, _CHANGE)
        self.check_sharing(node, op, given, result)
        self.check_fake(node, op, result)
        return result

    def without_originals(self, args: Any, kwargs: Any) -> Any:
        """The arguments with clones in the place of what lies in an original's memory."""
        tensors = [t for t in _tensors((args, kwargs)) if any(share_memory(t, o) for o in self.originals)]
        clones = {id(tensor): clone for tensor, clone in zip(tensors, clone_together(tensors), strict=True)}
        return _replaced((args, kwargs), clones) if clones else (args, kwargs)

    def check_sharing(self, node: torch.fx.Node, op: Any, named: list[tuple[str, torch.Tensor]], result: Any) -> None:
        results = [(i, t) for i, value in enumerate(_results(result)) for t in _tensors(value)]
        for at, (index, tensor) in enumerate(results):
            for name, given in named:
                if share_memory(tensor, given) and not operators.may_share(op, index, name):
                    what = f"result {index} of {op} shares memory with its argument {name!r}"
                    raise self.mismatch(node, op, f"{what}, and its schema doesn't say so", _RETURN)
            declared = any(operators.may_share(op, index, name) for name, _ in named)
            if not declared and any(share_memory(tensor, other) for _, other in results[:at]):
                raise self.mismatch(node, op, f"result {index} of {op} shares memory with another result", _RETURN)

    def check_fake(self, node: torch.fx.Node, op: Any, result: Any) -> None:
        fake = _fake(node)
        if not {"example_value", "val"} & node.meta.keys():
            return
        fakes, reals = _leaves(fake), _leaves(result)
        if len(fakes) != len(reals):
            raise self.mismatch(node, op, f"{op} gives {len(reals)} values, and its fake {len(fakes)}", _FAKE)
        for index, (told, real) in enumerate(zip(fakes, reals, strict=True)):
            fake_runs.bind_symbols(told, real, self.sizes)
            for fact, is_told, is_real in self.compared(told, real):
                if is_told != is_real:
                    what = f"the {fact} of result {index} of {op} is {is_real}, and its fake says {is_told}"
                    raise self.mismatch(node, op, what, _FAKE)

    def compared(self, told: Any, real: Any) -> Iterator[tuple[str, Any, Any]]:
        """(fact, value of the fake, value of the real result). What a fake leaves open agrees with anything."""
        yield "type", _kind(told), _kind(real)
        if not isinstance(real, torch.Tensor):
            known = fake_runs.known_size(told, self.sizes) if shapes.is_symbolic(told) else told
            yield "value", real if known is None else known, real
            return
        yield "dtype", told.dtype, real.dtype
        yield "device", str(told.device), str(real.device)
        yield "layout", told.layout, real.layout
        yield "shape", self.numbers(told.shape, real.shape), list(real.shape)
        if real.layout == torch.strided and real.numel() > 0:
            free = [index for index, size in enumerate(real.shape) if size == 1]  # any stride is right there
            strides = [0 if i in free else s for i, s in enumerate(real.stride())]
            said = [0 if i in free else s for i, s in enumerate(self.numbers(told.stride(), real.stride()))]
            yield "strides", said, strides

    def numbers(self, told: Any, real: Any) -> list[Any]:
        """Sizes or strides of a fake, each as a number; what is open is as it really is."""
        known = [fake_runs.known_size(size, self.sizes) for size in told]
        if len(told) != len(real):
            return [str(size) if number is None else number for size, number in zip(told, known, strict=True)]
        return [number if size is None else size for size, number in zip(known, real, strict=True)]

    def mismatch(self, node: torch.fx.Node, op: Any, what: str, hint: str) -> CustomOpError:
        user = user_line(node)
        quoted = source_line(user)
        return CustomOpError(f"{what} ({op._schema})", where=f"{user}: {quoted}" if quoted else user, hint=hint)


_CHANGE = (
    "name the argument in `mutates_args=` of torch.library.custom_op or onegraph.opaque, write it as `Tensor(a!)` in "
    "a schema of your own, or let the op work on a clone"
)
_RETURN = "return a clone: `return x.clone()`"
_FAKE = (
    "mend the fake (`register_fake`, or `fake=` of onegraph.opaque): it must describe the result at every size; an op "
    "that gives other strides for some inputs can return `.contiguous()`"
)


def _fake(node: torch.fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _results(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list | tuple) else [value]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor)]


def _replaced(value: Any, clones: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, clones) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(item, clones) for item in value)
    return clones.get(id(value), value)


def _facts(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    strides = value.stride() if value.layout == torch.strided else None
    return (value.dtype, value.device, tuple(value.shape), strides)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "tensor"
    if shapes.is_symbolic(value):
        return {"SymInt": "int", "SymFloat": "float", "SymBool": "bool"}[type(value).__name__]
    return type(value).__name__
