"""Where a module leaves the graph: reads of tensor values on the host in a graph, and further graph breaks.

Takes a captured graph, or a module that couldn't be captured. Gives the places as data, in the user's lines.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo as dynamo
from torch._dynamo import symbolic_convert
from torch._subclasses.fake_tensor import FakeTensorMode

from onegraph.torch_compat import pytree
from onegraph.torch_compat.shapes import is_torch_file, user_line

_HOST_METHODS = {"item": ".item()", "tolist": ".tolist()", "cpu": ".cpu()"}


@dataclass(frozen=True)
class HostRead:
    """An operation that gives a tensor's values to the host: `.item()`, `.tolist()`, `.cpu()`, numpy."""

    what: str
    user: str | None


@dataclass(frozen=True)
class GraphBreak:
    """One graph break: torch's reason (its first line), and the user's line."""

    reason: str
    user: str | None


def host_reads(graph_module: torch.fx.GraphModule) -> tuple[HostRead, ...]:
    """Reads on the host that Dynamo has put into its graph, in order; each would stop an accelerator's queue."""
    reads = (
        HostRead(what, user_line(node.meta.get("stack_trace")))
        for node in graph_module.graph.nodes
        if (what := _host_read(node)) is not None
    )
    return tuple(dict.fromkeys(reads))


def _host_read(node: torch.fx.Node) -> str | None:
    if node.op == "call_method":
        if node.target == "view_as" and len(node.args) == 2 and node.args[0] is node.args[1]:
            return ".numpy()"  # how Dynamo writes it
        return _HOST_METHODS.get(str(node.target))
    if node.op == "call_function" and getattr(node.target, "__module__", None) == "torch._dynamo.utils":
        return "numpy" if "numpy" in type(node.target).__name__.lower() else None
    return None


def further_breaks(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[GraphBreak, ...]:
    """All graph breaks of one call that can be found without computing, in order.

    Method: a copy of the module whose tensors are fake is traced by Dynamo piece by piece, as torch.compile would;
    what the copy changes of itself is lost, what it prints is kept back. Ends at the first line that needs a real
    value, so the list may be short; it is empty where a module can't be copied.
    """
    found: list[GraphBreak] = []
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _unchanged_globals(module), contextlib.suppress(Exception), _quiet(), _noted_breaks(found), mode:
        fake = copy.deepcopy(module)
        fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, torch.empty_like, (args, kwargs))
        dynamo.optimize("eager")(fake)(*fake_args, **fake_kwargs)
    return tuple(dict.fromkeys(found))


def _with_wrapped(function: Any) -> Iterator[Any]:
    """The function behind a method, and those that its decorators have wrapped."""
    function = getattr(function, "__func__", function)
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


@contextlib.contextmanager
def _unchanged_globals(module: torch.nn.Module) -> Iterator[None]:
    """The globals of the modules' code as they were, with the contents of their lists, dicts and sets."""
    forwards = (forward for child in module.modules() for forward in _with_wrapped(child.forward))
    users = [f for f in forwards if hasattr(f, "__code__") and not is_torch_file(f.__code__.co_filename)]
    spaces = {id(f.__globals__): f.__globals__ for f in users}
    before = [(space, dict(space)) for space in spaces.values()]
    kinds = (list, dict, set)
    contents = [
        (value, value.copy())
        for _, names in before
        for name, value in names.items()
        if type(value) in kinds and not name.startswith("__")
    ]
    try:
        yield
    finally:
        for space, names in before:
            for name in set(space) - set(names):
                if not name.startswith("__"):  # these are Dynamo's, which takes them away itself
                    del space[name]
            space.update(names)
        for value, copied in contents:
            if isinstance(value, list):
                value[:] = copied
            elif list(value) != list(copied) or isinstance(value, dict):
                for added in set(value) - set(copied):
                    value.discard(added) if isinstance(value, set) else value.pop(added)
                value.update(copied)


@contextlib.contextmanager
def _noted_breaks(found: list[GraphBreak]) -> Iterator[None]:
    """Adds each graph break that Dynamo logs inside the block."""
    translator = symbolic_convert.InstructionTranslatorBase
    original = translator.log_graph_break

    def noted(self: Any, code_options: Any, reason: str, exc: Any) -> None:
        found.append(GraphBreak(_first_line(str(exc)), _frame(getattr(exc, "real_stack", None))))
        original(self, code_options, reason, exc)

    translator.log_graph_break = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        translator.log_graph_break = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    patches = {"suppress_errors": False, "verbose": False}
    fakes_log = logging.getLogger("torch._subclasses.fake_tensor")
    level = fakes_log.level
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        dynamo.config.patch(patches),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        fakes_log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            fakes_log.setLevel(level)


def _first_line(reason: str) -> str:
    return reason.strip().splitlines()[0]


def _frame(stack: Any) -> str | None:
    frames = [f for f in stack or () if not is_torch_file(f.filename)] or list(stack or ())
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
