"""Capture: one call of a module, traced by Dynamo into one full graph; what it assumes, read and judged.

Takes a module, method or function, an example call, and the declared dynamic dims. Gives a CapturedGraph.
The example's sizes don't reach the graph: each declared dim is an unknown size within its range.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from onegraph.capture.cache_writes import declare_cache_writes
from onegraph.capture.captured_call import captured_call
from onegraph.capture.constraints import judge, judge_region, refuse_narrowing
from onegraph.capture.dropout import settle_dropout
from onegraph.capture.effects import refuse_effects
from onegraph.capture.failures import capture_error, refuse_host_reads
from onegraph.capture.inputs import CallInputs, read_call
from onegraph.capture.regions import UNBACKED, Sizing
from onegraph.capture.roots import Scope, as_written, rooted_expression, scope_of
from onegraph.capture.runtime_asserts import drop_judged_asserts
from onegraph.capture.signatures import call_signature, traced_function
from onegraph.capture.size_dependent_views import size_dependent_views
from onegraph.capture.sized_arguments import dynamic_strides, sized_arguments
from onegraph.capture.state import reads_grad_mode
from onegraph.capture.state_check import evaluate
from onegraph.capture.trace_record import record_trace
from onegraph.capture.weights import lift_weights
from onegraph.counters import counters
from onegraph.errors import CaptureError
from onegraph.ir.graph import CapturedGraph
from onegraph.ir.ledger import Ledger
from onegraph.ir.source_text import code_digest, source_files
from onegraph.ir.traced import GuardFact, Places, TraceFacts
from onegraph.torch_compat import dynamo, shapes
from onegraph.torch_compat.inference_mode import drop_inference_mode

_ENVIRONMENT_NAMES = frozenset({"environ", "environb", "getenv", "getenvb"})


def capture(
    module: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    dynamic_shapes: Any,
    max_size: int,
    required_alignment: Callable[[int], int],
    sizing: Sizing = UNBACKED,
    split: bool = False,
    state_is_checked: bool = True,
) -> CapturedGraph:
    """Traces the call; must run inside `torch_compat.dynamo.compile_scope`. The module isn't run.

    With backed sizes in `sizing` the graph is for those sizes for which the trace would go the same way: ledger
    entries with the effect `split`. Without `split` that may be all but 0 and 1. `state_is_checked` says that what
    the trace read is compared before every call, so that a module may change it.

    Raises ConfigError (the call and the declared dims don't fit), CaptureError (a graph break, with the user's
    line and torch's hint), ConstraintError (the model needs more than was declared).
    """
    function, owner = traced_function(module)
    inputs = read_call(call_signature(module), args, kwargs, dynamic_shapes, max_size, sizing=sizing)
    counters.add("dynamo_compiles")
    trace = functools.partial(dynamo.capture, size_oblivious=sizing.mode == "backed_size_oblivious")
    try:
        with torch.no_grad():
            raw = trace(module, inputs.args, inputs.kwargs)
        if torch.is_grad_enabled() and reads_grad_mode(raw.guards):  # its answer must be the caller's
            raw = trace(module, inputs.args, inputs.kwargs)
        raw = _with_counters_as_inputs(raw, module, inputs, trace, scope_of(function, owner, inputs, raw.globals_read))
    except dynamo.CAPTURE_EXCEPTIONS as error:
        raise capture_error(error, module, inputs) from error
    refuse_host_reads(raw.graph_module)
    if raw.stored_globals:
        raise CaptureError(
            f"the module assigns the global {raw.stored_globals[0]!r} when it is called",
            where=f"{function.__module__}.{function.__qualname__}",
            hint="keep such state in an attribute of the module, or outside of it",
        )
    counters.add("graphs_captured")
    return _captured_graph(raw, inputs, module, function, owner, required_alignment, sizing, split, state_is_checked)


def _with_counters_as_inputs(
    raw: dynamo.RawCapture, module: Any, inputs: CallInputs, trace: Callable[..., dynamo.RawCapture], scope: Scope
) -> dynamo.RawCapture:
    """Traced once more with the ints that the module changes as inputs of the graph: `self.calls += 1` counts on."""
    sources = tuple(source for state in raw.changed_state for source in state.sources)
    if not sources or not all(state.sources for state in raw.changed_state):
        return raw
    rooted = [rooted_expression(source, scope) for source in sources]
    if any(one is None or not (isinstance(n := evaluate(*one), int) and n >= 0) for one in rooted):
        return raw  # torch takes such an input for a size
    try:
        with torch.no_grad():
            again = trace(module, inputs.args, inputs.kwargs, unbacked=sources)
    except Exception:  # noqa: BLE001 - it decides on the counter, or torch does: the first trace has it as a constant
        return raw
    return raw if again.changed_state else dataclasses.replace(again, counted=raw.changed_state)


def _captured_graph(
    raw: dynamo.RawCapture,
    inputs: CallInputs,
    module: Any,
    function: Any,
    owner: Any,
    required_alignment: Callable[[int], int],
    sizing: Sizing,
    split: bool,
    state_is_checked: bool,
) -> CapturedGraph:
    graph_module, weights = lift_weights(raw.graph_module, function, owner)
    refuse_effects(
        raw, function=function, owner=owner, inputs=inputs, weights=weights, state_is_checked=state_is_checked
    )
    declare_cache_writes(graph_module)
    settle_dropout(graph_module)
    drop_inference_mode(graph_module)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    fake_inputs = tuple(node.meta["example_value"] for node in placeholders)
    fakes = dict(zip(raw.sources, fake_inputs[len(weights) :], strict=True))
    seen = {**shapes.tracked_fakes(raw.fake_mode.shape_env), **fakes}
    symbols = _symbols(inputs, seen)
    squeezed = shapes.squeezed_sizes(graph_module)
    _refuse_squeezed_data(squeezed, symbols)
    ranges = {dim.name: (dim.min, dim.max) for dim in inputs.dims}
    views = size_dependent_views(graph_module, {symbol: ranges[name] for symbol, name in symbols.items()})
    conditions = [*raw.asserted, *squeezed, *views, *shapes.conditions(raw.fake_mode.shape_env)]
    if sizing.mode == "unbacked":
        found = judge(conditions, inputs.dims, symbols, "capture")
        refuse_narrowing(found, inputs.dims)
    else:
        found = judge_region(conditions, inputs.dims, symbols, "capture", split)
    drop_judged_asserts(graph_module, symbols)
    scope = scope_of(function, owner, inputs, raw.globals_read)
    _refuse_hidden_tensors(inputs, fakes, scope)
    traced, strides = _facts(raw), dynamic_strides(inputs, fakes, symbols)
    call = captured_call(
        traced,
        raw.residual,
        strides,
        called=module,
        function=function,
        owner=owner,
        scope=scope,
        inputs=inputs,
        weights=weights,
        required_alignment=required_alignment,
    )

    return CapturedGraph(
        graph_module=graph_module,
        weights=weights,
        input_names=raw.sources,
        fake_inputs=fake_inputs,
        fake_mode=raw.fake_mode,
        dims=inputs.dims,
        sized=tuple(sized_arguments(inputs, seen, symbols)),
        symbols=symbols,
        ledger=Ledger(
            inputs=call.contract.entries,
            shapes=found,
            state=tuple(read.entry for read in call.state),
            sources=source_files(code for code in raw.traced_code if not shapes.is_torch_file(code.co_filename)),
        ),
        state=call.state,
        make_callable=call.make_callable,
        bind_entry=call.contract.bind,
        record=functools.partial(record_trace, traced, raw.residual, strides, call, function, owner),
        fixed=_fixed(inputs, seen),
        num_ops=sum(node.op.startswith("call_") for node in graph_module.graph.nodes),
    )


def _facts(raw: dynamo.RawCapture) -> TraceFacts:
    """With the modules that Dynamo put into the globals under the names that it has for those that it imports."""
    own_code = [code for code in raw.traced_code if not shapes.is_torch_file(code.co_filename)]
    names = {f"G['{name}']": f"G['__import_{module.replace('.', '_dot_')}']" for name, module in raw.modules.items()}
    of_dynamo = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def named(source: str) -> str:
        return of_dynamo.sub(lambda found: names[found[0]], source)

    def facts(found: Iterable[GuardFact]) -> tuple[GuardFact, ...]:
        return tuple(dataclasses.replace(fact, name=named(fact.name)) for fact in found)

    def places(found: Iterable[Places]) -> tuple[Places, ...]:
        return tuple(Places(named(one.left), named(one.right), one.user) for one in found)

    return TraceFacts(
        sources=raw.sources,
        guards=facts(raw.guards),
        asked=facts(raw.asked),
        same=places(raw.identities.same),
        compared=places(raw.identities.compared),
        builtins=raw.builtins,
        folded=raw.folded,
        functions=frozenset((code.co_qualname, code_digest(code)) for code in raw.traced_code),
        asks_for_gradients=any("requires_grad" in code.co_names for code in own_code),
        environment_user=_environment_user(raw.traced_code),
        stored_attributes=raw.stored_attributes,
        counted=frozenset(source for state in raw.counted for source in state.sources),
    )


def _environment_user(traced: tuple[types.CodeType, ...]) -> str | None:
    """Where traced code names the process's variables."""
    reading = [code for code in traced if not _ENVIRONMENT_NAMES.isdisjoint(code.co_names)]
    places = ((shapes.is_torch_file(code.co_filename), code.co_filename, code.co_firstlineno) for code in reading)
    _, file, line = min(places, default=(False, "", 0))
    return f"{file}:{line}" if file else None


def _refuse_squeezed_data(squeezed: list[shapes.RawCondition], symbols: dict[str, str]) -> None:
    """A size that depends on data may be 1 at any call, and the squeezed tensor's rank with it."""
    for condition in squeezed:
        if not {str(symbol) for symbol in condition.expr.free_symbols} <= symbols.keys():
            raise CaptureError(
                "squeeze meets a size that depends on data, so the number of dims would depend on it too",
                where=condition.user,
                hint="name the dims to squeeze that are always 1: x.squeeze(-1)",
            )


def _refuse_hidden_tensors(inputs: CallInputs, fakes: dict[str, Any], scope: Scope) -> None:
    """A tensor inside an object that the contract can't look into would be read unchecked."""
    known = {leaf.source for leaf in inputs.leaves} | {leaf.indexed_source for leaf in inputs.leaves}
    for source, fake in fakes.items():
        if isinstance(fake, torch.Tensor) and source not in known:
            shown = as_written(source, scope)
            if not any(leaf.source and source.startswith(leaf.source) for leaf in inputs.leaves):
                raise CaptureError(
                    f"the module reads the tensor {shown}, of an object that is no nn.Module",
                    where=shown,
                    hint="keep it as a buffer of an nn.Module, or pass it as an argument",
                )
            raise CaptureError(
                f"the module reads the tensor {shown}, inside an argument whose type isn't known",
                where=shown,
                hint="pass tensors as arguments, or in lists, tuples, dicts, named tuples or dataclasses",
            )


def _fixed(inputs: CallInputs, fakes: dict[str, Any]) -> dict[str, int]:
    """The declared dims that the trace has as constants: a sample's size of 0 or 1."""
    found: dict[str, int] = {}
    for leaf in inputs.leaves:
        fake = fakes.get(leaf.source, fakes.get(leaf.indexed_source))
        if isinstance(fake, torch.Tensor):
            found |= {dim.name: size for i, dim in leaf.dims.items() if isinstance(size := fake.shape[i], int)}
    return found


def _symbols(inputs: CallInputs, fakes: dict[str, Any]) -> dict[str, str]:
    """Which of torch's symbols stands for which declared dim, read off the declared dims of the inputs."""
    symbols: dict[str, str] = {}
    for leaf in inputs.leaves:
        fake = fakes.get(leaf.source, fakes.get(leaf.indexed_source))
        if isinstance(fake, torch.Tensor):
            for index, dim in leaf.dims.items():
                for symbol in shapes.symbol_names(fake.shape[index]):
                    symbols[symbol] = dim.name
    return symbols
