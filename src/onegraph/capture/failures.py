"""What goes wrong while tracing, in the user's terms: graph breaks, undecided sizes, values read on the host.

Takes what Dynamo raised, or the graph that it made. Gives onegraph's errors, each with the ways out that apply.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from onegraph.capture.constraints import ConstraintReport, data_dependent_constraint, source_line
from onegraph.capture.inputs import CallInputs
from onegraph.errors import CaptureError, OnegraphError
from onegraph.torch_compat import breaks, dynamo, shapes

_HIDE = "move it out of forward, or hide it from tracing in a function under @onegraph.opaque (docs/custom-ops.md)"
_WAYS_OUT = (
    (r"`print`", "remove it, or print outside of forward: compiled code would print once, at capture"),
    (r"Random|random\.", "draw with torch.rand, whose stream stays eager's, or pass the value as an argument"),
    (r"[Dd]ata-dependent|generic_jump", "choose with torch.where(condition, a, b), or with torch.cond"),
    (r"tolist|\.item|numpy", "keep the value in a tensor, or pass it as an argument"),
)
_MAY_BE_SUPPORTED = re.compile(r"report an issue|may be possible to write|file an issue|Dynamo bug", re.IGNORECASE)
_READS = {
    ".cpu()": "leave the tensor on its device, and copy the module's result instead",
    ".item()": "keep the value in a tensor (x.sum() is one already), or pass it as an argument",
    ".tolist()": "keep the values in a tensor, or pass the list as an argument",
}


def refuse_host_reads(graph_module: torch.fx.GraphModule) -> None:
    """Raises CaptureError for the reads of tensor values on the host that tracing let through, with all lines."""
    reads = breaks.host_reads(graph_module)
    if not reads:
        return
    first = reads[0]
    raise CaptureError(
        f"the module reads a tensor's values on the host: {first.what}",
        where="\n         ".join(_place(read.user) for read in reads),
        hint=f"{_READS.get(first.what, 'write it with torch operations')}. The graph would wait for the device at "
        "this line in every call, and no CUDA graph can record it",
    )


def capture_error(error: BaseException, module: Any, inputs: CallInputs) -> OnegraphError:
    """The error for what Dynamo raised while tracing `module`."""
    for cause in dynamo.causes(error):
        if isinstance(cause, OnegraphError):  # raised by a fake of ours
            return cause
    failure = dynamo.explain_failure(error)
    frames = [f for f in failure.user_frames if not shapes.is_torch_file(f.filename)] or list(failure.user_frames)
    user = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
    if failure.condition is not None:
        entry = data_dependent_constraint(failure.condition, user, inputs.dims, failure.symbols)
        if entry is None:
            return CaptureError(
                f"the module decides on a value that only the tensors have: {failure.condition}",
                where=_place(user),
                hint="choose with torch.where(condition, a, b), or pass the value as an argument",
            )
        decides = shapes.is_condition(failure.condition)
        return ConstraintReport((entry,), inputs.dims, either=decides).error(
            "the model decides on a size that is declared dynamic"
            if decides
            else "the model needs a number that follows from a size that is declared dynamic"
        )
    return CaptureError(
        f"the module can't be captured as one graph: {failure.reason}",
        where=_place(user) + _callers(frames) + _further(module, inputs, user),
        hint=_break_hint(failure),
    )


def _place(user: str | None) -> str:
    quoted = source_line(user)
    return f"{user}: {quoted}" if quoted else str(user or "torch")


def _callers(frames: list[Any]) -> str:
    """The user's frames around the innermost one, nearest first."""
    around = [f"{frame.filename}:{frame.lineno}" for frame in reversed(frames[:-1])][:3]
    return "".join(f"\n         called from {_place(place)}" for place in around)


def _further(module: Any, inputs: CallInputs, first: str | None) -> str:
    """Other graph breaks of the same call, where the module can be copied to look for them."""
    if not isinstance(module, torch.nn.Module):
        return ""
    others = [b for b in breaks.further_breaks(module, inputs.args, inputs.kwargs) if b.user != first]
    return "".join(f"\n         and {_place(b.user)}   ({b.reason})" for b in others)


def _break_hint(failure: dynamo.CaptureFailure) -> str:
    ways = [way for pattern, way in _WAYS_OUT if re.search(pattern, failure.reason)][:1] or [_HIDE]
    lines = ways + [f"torch says: {hint}" for hint in failure.hints[:3]]
    if any(_MAY_BE_SUPPORTED.search(hint) for hint in failure.hints):
        lines.append(
            "torch could support this; the text for an issue at github.com/pytorch/pytorch:\n"
            f"           torch.compile(fullgraph=True), torch {torch.__version__}: "
            + failure.reason.replace("\n", "\n           ")
        )
    return "\n         ".join(lines)
