"""Dynamo as a capture tool: one call of a function in, one full graph and its residual code out.

Takes example arguments whose dynamic dims are marked here as unbacked, so that neither the example's sizes nor
the values 0 and 1 are specialised on. Keeps nothing: guards come back as data, and are not installed anywhere.
"""

from __future__ import annotations

import contextlib
import dis
import logging
import operator
import threading
import traceback
import types
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch._dynamo as dynamo
import torch._dynamo.convert_frame as convert_frame
import torch.fx.experimental._config as symbolic_config
from torch._dynamo import decorators, symbolic_convert
from torch._dynamo.exc import TensorifyScalarRestartAnalysis, TorchDynamoException, Unsupported
from torch._dynamo.symbolic_convert import TensorifyState
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch.fx.experimental.symbolic_shapes import (
    ConstraintViolationError,
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
)
from torch.utils._sympy.symbol import SymT, symbol_is_type

from onegraph.garbage import collected_later
from onegraph.ir.traced import FoldedCall, GuardFact, Residual, UsedBuiltin
from onegraph.torch_compat.effects import Effect, effects
from onegraph.torch_compat.folds import folded_calls
from onegraph.torch_compat.guards import guard_facts
from onegraph.torch_compat.identity import Identities, identities
from onegraph.torch_compat.lookups import lookups
from onegraph.torch_compat.shapes import RawCondition, asserted_while_tracing, declared_symbols, inferred_strides
from onegraph.torch_compat.structured_trace import first_attempt, new_compile_context
from onegraph.torch_compat.tensor_questions import tensor_questions
from onegraph.torch_compat.traced_function import python_callable, traced_function

COMPILE_LOCK = threading.RLock()
"""Held while torch compiles anything for us: Dynamo, Inductor and torch's config are not thread-safe together."""


@dataclass(frozen=True)
class ChangedState:
    """Python state that residual code writes and that the trace has read: one call's outcome would be repeated.

    `sources` are the expressions of the values that were read as constants, empty for what isn't an attribute.
    """

    what: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class RawCapture:
    """What Dynamo found. `sources` gives, for each placeholder, where residual code takes its value from; `asked` are
    facts beside the guards, about tensors; `globals_read` is the `G` of the guards' expressions, and `modules` are
    those that Dynamo put there under names of its own; `stored_attributes` are the names of the attributes that
    residual code sets, of whatever object; `guards` hold what tracing looked up in vain, too.
    """

    graph_module: torch.fx.GraphModule
    sources: tuple[str, ...]
    fake_mode: Any
    guards: tuple[GuardFact, ...]
    asked: tuple[GuardFact, ...]
    globals_read: Mapping[str, Any]
    asserted: tuple[RawCondition, ...]
    folded: tuple[FoldedCall, ...]
    identities: Identities
    traced_code: tuple[types.CodeType, ...]
    residual: Residual
    modules: Mapping[str, str]
    stored_globals: tuple[str, ...]
    stored_attributes: frozenset[str]
    changed_state: tuple[ChangedState, ...]
    effects: tuple[Effect, ...]
    builtins: tuple[UsedBuiltin, ...]
    counted: tuple[ChangedState, ...] = ()
    """The state whose ints are inputs of the graph, so that they aren't in `changed_state`."""


@dataclass(frozen=True)
class CaptureFailure:
    """Why Dynamo gave up, in parts that an error message can be made of.

    `condition` is the expression on sizes that could not be decided, as a sympy expression, if that was it;
    `symbols` maps its symbols to the names of the dynamic dims.
    """

    reason: str
    hints: tuple[str, ...]
    user_frames: tuple[traceback.FrameSummary, ...]
    condition: Any | None = None
    symbols: dict[str, str] = field(default_factory=dict)


def is_of_module(tensor: torch.Tensor) -> bool:
    """Whether Dynamo, which hands weights to a backend as inputs, found it as a module's parameter or buffer."""
    return getattr(tensor, "_dynamo_static_input_type", None) is not None


def mark_dynamic_dim(tensor: torch.Tensor, dim: int, *, name: str, minimum: int, maximum: int, hint: int) -> None:
    """Marks one dim of the tensor (the Python object is changed) as unknown within minimum..maximum."""
    try:
        decorators.mark_unbacked(tensor, dim, shape_id=name, min=minimum, max=maximum, hint_override=hint)
    except TypeError:  # torch 2.11: no min and max; the range is then proven after capture instead
        decorators.mark_unbacked(tensor, dim, shape_id=name, hint_override=hint)


def mark_backed_dim(tensor: torch.Tensor, dim: int, *, minimum: int, maximum: int) -> None:
    """Marks one dim of the tensor (the Python object is changed) as dynamic; the trace branches as its size does."""
    decorators.mark_dynamic(tensor, dim, min=minimum, max=maximum)


@contextlib.contextmanager
def _no_headers_of_unread_logs() -> Iterator[None]:
    """Dynamo makes the header of a line of its log `trace_call` for each node, whether or not anybody reads it, and
    tokenizes each source file for that (torch 2.13): half a second at 30 layers."""
    if not hasattr(symbolic_convert, "get_funcname") or symbolic_convert.trace_call_log.isEnabledFor(logging.DEBUG):
        yield
        return

    def no_name(filename: str, lineno: int) -> None:
        return None

    with mock.patch.object(symbolic_convert, "get_funcname", no_name):
        yield


@contextlib.contextmanager
def compile_scope(name: str) -> Iterator[None]:
    """One compile in torch's own books: a compile id, metrics and timings, for TORCH_TRACE and TORCH_LOGS."""
    with (
        COMPILE_LOCK,
        collected_later(),
        new_compile_context(),  # around the metrics, which are written at the end
        get_metrics_context(),
        dynamo_timed(name),
    ):
        yield


def capture(
    function: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    unbacked: tuple[str, ...] = (),
    size_oblivious: bool = False,
) -> RawCapture:
    """Traces one call of a module, method or function into one graph; must run inside `compile_scope`.

    Method: `torch._dynamo.convert_frame.fullgraph_capture`, with parameters, buffers and free tensors installed
    on the graph instead of passed by the residual code. The ints at the sources `unbacked` (`L['self'].calls`) are
    inputs of the graph instead of constants. With `size_oblivious` backed sizes aren't told
    from 0 and 1. Raises what Dynamo raises; see `explain_failure`.
    """
    patches = {
        "install_free_tensors": True,
        "automatic_dynamic_shapes": False,
        "assume_static_by_default": True,
        "record_pre_graph_bytecode_in_traces": False,
        "suppress_errors": False,
    }
    compiler_patches: dict[str, Any] = {}
    if unbacked and hasattr(torch.compiler.config, "unbacked_sources"):
        patches["allow_unspec_int_on_nn_module"] = True
        compiler_patches["unbacked_sources"] = ",".join(unbacked)
    known = {key: value for key, value in patches.items() if hasattr(dynamo.config, key)}
    frame = convert_frame._get_frame(python_callable(function), args, kwargs)
    traced, _ = traced_function(function)
    names_before = set(traced.__globals__)
    with (
        warnings.catch_warnings(),
        dynamo.config.patch(known),
        torch.compiler.config.patch(compiler_patches),
        symbolic_config.patch(backed_size_oblivious=size_oblivious),
        _no_headers_of_unread_logs(),
        inferred_strides(),
        asserted_while_tracing() as asserted,
        folded_calls() as folded,
        identities() as decided,
        tensor_questions() as asked,
        lookups() as looked_up,
        effects() as written,
    ):
        warnings.filterwarnings("ignore", "Dynamo does not know how to trace")  # the error that follows says it
        try:
            output = convert_frame._fullgraph_capture_frame(frame)
        finally:
            first_attempt()
    graph_output, backend_input = output.graph_capture_output, output.backend_input
    if backend_input is None:
        raise Unsupported("there is no tensor operation in the traced function")
    # Dynamo leaves its graph, with all weights on it, in the globals of the traced function.
    traced.__globals__.pop(backend_input.backend_id, None)
    index_to_source = graph_output.output_graph.export_metadata.graph_input_idx_to_local_source
    placeholders = [n for n in backend_input.graph_module.graph.nodes if n.op == "placeholder"]
    guards = (*guard_facts(graph_output.output_graph.guards), *looked_up.absent)
    return RawCapture(
        graph_module=backend_input.graph_module,
        sources=tuple(
            index_to_source[i].name if i in index_to_source else str(node.target) for i, node in enumerate(placeholders)
        ),
        fake_mode=backend_input.fake_mode,
        guards=guards,
        asked=tuple(asked),
        globals_read=graph_output.output_graph.global_scope,
        asserted=tuple(asserted),
        folded=tuple(folded),
        identities=decided,
        traced_code=tuple(graph_output.traced_code),
        modules={
            name: value.__name__
            for name, value in traced.__globals__.items()
            if name not in names_before and isinstance(value, types.ModuleType)
        },
        residual=_residual(graph_output.get_runtime_env(), backend_input.backend_id, traced, names_before),
        stored_globals=_stored_globals(graph_output.bytecode),
        stored_attributes=frozenset(_stored_attributes(graph_output.bytecode)),
        changed_state=tuple(dict.fromkeys(_changed_state(graph_output.bytecode, guards, written))),
        effects=tuple(written),
        builtins=tuple(looked_up.builtins),
    )


def _residual(environment: Any, graph: str, traced: types.FunctionType, names_before: set[str]) -> Residual:
    used = {str(i.argval) for i in dis.get_instructions(environment.bytecode) if i.opname == "LOAD_GLOBAL"}
    installed = {**environment.used_globals, **traced.__globals__}
    imports = dict(environment.import_sources)
    same = environment.closure is None or all(map(operator.is_, environment.closure, traced.__closure__ or ()))
    return Residual(
        code=environment.bytecode,
        graph=graph,
        globals_used=tuple(sorted(used - {graph})),
        imports=imports,
        installed={name: installed[name] for name in sorted((used & installed.keys()) - names_before - imports.keys())},
        argdefs=environment.argdefs,
        kwdefaults=getattr(environment, "kwdefaults", None),
        closure=environment.closure,
        foreign_closure=not same,
    )


def _stored_globals(code: types.CodeType) -> tuple[str, ...]:
    return tuple(str(i.argval) for i in dis.get_instructions(code) if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"))


def _stored_attributes(code: types.CodeType) -> Iterator[str]:
    setting = False
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_ATTR", "DELETE_ATTR"):
            yield instruction.argval
        elif instruction.argval == "object_setattr_ignore_descriptor":
            setting = True
        elif setting and instruction.opname == "LOAD_CONST" and isinstance(instruction.argval, str):
            yield instruction.argval
            setting = False


def _changed_state(
    code: types.CodeType, guards: tuple[GuardFact, ...], written: list[Effect]
) -> Iterator[ChangedState]:
    """What residual code writes of the state that was read.

    An attribute is told by a guard on its value, of the object that Dynamo notes as changed or, by the attribute's
    name alone, of whatever object; a list that isn't an argument is written as a whole.
    """
    value_guards = ("CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH", "ID_MATCH")
    read: dict[str, set[str]] = {}
    for guard in guards:
        if guard.kind in value_guards:
            read.setdefault(guard.name.rpartition(".")[2], set()).add(guard.name)
    for effect in written:
        if effect.attribute in read and f"{effect.source}.{effect.attribute}" in read[effect.attribute]:
            yield ChangedState(f"the attribute {effect.attribute!r}", tuple(sorted(read[effect.attribute])))
    instructions = [
        i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "PRECALL", "COPY", "SWAP", "POP_TOP")
    ]
    for index, instruction in enumerate(instructions):
        following, before = instructions[index + 1 :], instructions[:index]
        if instruction.argval == "object_setattr_ignore_descriptor":
            name = next((i.argval for i in following if i.opname == "LOAD_CONST" and isinstance(i.argval, str)), None)
            if name in read:
                yield ChangedState(f"the attribute {name!r}", tuple(sorted(read[name])))
        elif instruction.opname in ("STORE_ATTR", "DELETE_ATTR") and instruction.argval in read:
            yield ChangedState(f"the attribute {instruction.argval!r}", tuple(sorted(read[instruction.argval])))
        elif instruction.opname in ("STORE_SUBSCR", "STORE_SLICE"):
            holder = next((i for i in reversed(before) if i.opname not in ("LOAD_CONST", "BUILD_SLICE")), None)
            if holder is not None and holder.opname in ("LOAD_ATTR", "LOAD_GLOBAL", "LOAD_DEREF"):
                yield ChangedState(f"the list {holder.argval!r}")


CAPTURE_EXCEPTIONS = (
    TorchDynamoException,
    ConstraintViolationError,
    GuardOnDataDependentSymNode,
    PendingUnbackedSymbolNotFound,
)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from or while handling, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain_failure(error: BaseException) -> CaptureFailure:
    """Takes apart what Dynamo raised: torch's reason, its hints, and the frames of the user's code."""
    condition, symbols = None, {}
    for cause in causes(error):
        if isinstance(cause, GuardOnDataDependentSymNode):
            condition, symbols = cause.cond, declared_symbols(cause)
    stack = getattr(error, "real_stack", None) or ()
    lines = str(error).split("\n\nfrom user code:")[0].strip().splitlines()
    hints = tuple(line.strip()[len("Hint:") :].strip() for line in lines if line.strip().startswith("Hint:"))
    reason = [line for line in lines if line.strip() and not line.strip().startswith(("Hint:", "Developer debug"))]
    return CaptureFailure(
        reason="\n".join(line.rstrip() for line in reason[:6]),
        hints=hints,
        user_frames=tuple(stack),
        condition=condition,
        symbols=symbols,
    )


def current_fake_mode() -> Any:
    """The fake mode of the graph that Dynamo is handing to a backend right now."""
    context = torch._guards.TracingContext.get()
    return context.fake_mode


def make_floats_constant() -> None:
    """Has Dynamo trace the graph that it is handing over again, with its floats as constants that guards compare.

    Dynamo hands a float over as a tensor, whose `.item()` only passes of its own can follow. Raises its request to
    trace again, which is to reach it as it is, where there are floats.
    """
    shape_env = current_fake_mode().shape_env
    values = shape_env.backed_var_to_val if hasattr(shape_env, "backed_var_to_val") else shape_env.var_to_val
    floats = [str(symbol) for symbol in values if symbol_is_type(symbol, SymT.FLOAT)]
    floats = [name for name in floats if not TensorifyState.should_specialize(name)]
    for name in floats:
        TensorifyState.specialize(name)
    if floats:
        raise TensorifyScalarRestartAnalysis
