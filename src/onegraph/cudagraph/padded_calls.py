"""Library calls of sizes that aren't recorded, done at the next recorded size: what is filled with what, and cut off.

Takes a graph with one declared dim, and a policy for each input that has it. A policy says what stands in the rows
behind the call's; that a result's rows don't depend on those of others is the user's word, who gave the policies.
Results are cut back along the dims that are as long as the declared dim; of any other length that follows from it
nobody knows which part is padding, so such a call isn't padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from onegraph.config.compilation import CUDAGraphMode
from onegraph.cudagraph.call_memory import Kind, share_storage
from onegraph.cudagraph.graph import RecordedGraph
from onegraph.cudagraph.padding import fill_padding, fits
from onegraph.cudagraph.sizes import Dispatcher
from onegraph.errors import ConfigError, nearest
from onegraph.ir.dims import DynamicDim, SizedArgument
from onegraph.ir.padding import Policy
from onegraph.ir.recording import RecordedSize
from onegraph.ops.memory import clone_together

_WHERE = "cudagraph_padding"


@dataclass(frozen=True)
class PaddedInput:
    """One of the plan's inputs, by its index: which of its dims are padded, and with what."""

    index: int
    dims: tuple[int, ...]
    policy: Policy


class PaddedCalls:
    """How calls of one graph are padded. `slots(size, {})` makes inputs of a size, by path.

    `why_not` is the code of why none can be, as far as the graph tells. Raises ConfigError for policies that don't fit
    the arguments.
    """

    def __init__(
        self,
        graph: RecordedGraph,
        policies: Mapping[str, Policy],
        dims: Sequence[DynamicDim],
        slots: Callable[[int, Mapping[str, int]], dict[str, torch.Tensor]],
    ) -> None:
        if len(dims) != 1:
            raise ConfigError(
                f"cudagraph_padding is about the sizes of one dynamic dim, and there are {len(dims)}",
                where=_WHERE,
                hint="leave it out, and pad the calls that you record() yourself",
            )
        self.policies = _by_argument(graph, policies)
        self._names, self._slots = graph.names, slots
        self._inputs = tuple(_padded_inputs(graph, self.policies, dims[0]))
        self._sizes = [index for index, owner in enumerate(graph.owners) if owner == "size"]
        self._num_sizes = len(set(graph.plan.symbols.values()))
        cuts = _result_dims(graph)
        self._cuts = [one or () for one in cuts]
        self.why_not = (
            "size_reaches_nothing"
            if graph.plan.size is None or not self._inputs
            else "result_size_follows_otherwise"
            if None in cuts
            else None
        )

    def why_not_at(self, length: int) -> str | None:
        """The code of why a call of a size isn't padded."""
        has_no_last = not length and any(one.policy == "last" for one in self._inputs)
        return self.why_not or ("no_last_row" if has_no_last else None)

    def sizes(self, size: int) -> tuple[int, ...]:
        """All sizes that the plan's inputs show, of a call of this size."""
        return (size,) * self._num_sizes

    def new_memory(self, size: int) -> dict[int, torch.Tensor]:
        """Zeros for the padded inputs, by index."""
        slots = self._slots(size, {})
        return {one.index: slots[self._names[one.index]] for one in self._inputs}

    def placed(
        self, inputs: Sequence[Any], statics: Mapping[int, torch.Tensor], length: int, size: int
    ) -> tuple[Any, ...]:
        """The inputs of a call of `length` as one of `size`: in the memory of `statics`, with padding.

        An input that lies where the static one begins is filled already.
        """
        whole = list(inputs)
        moved: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index in self._sizes:
            whole[index] = size
        for one in self._inputs:
            given, front = inputs[one.index], statics[one.index]
            whole[one.index] = front
            for dim in one.dims:
                front = front.narrow(dim, 0, length)
            if given.data_ptr() != front.data_ptr() or given.stride() != front.stride():
                moved.append((front, given))
        sources = [given for _, given in moved]
        if share_storage(sources, statics.values()):
            sources = clone_together(sources)  # one may be copied over another
        for (front, _), source in zip(moved, sources, strict=True):
            front.copy_(source)
        for one in self._inputs:
            fill_padding(whole[one.index], dict.fromkeys(one.dims, length), one.policy)
        return tuple(whole)

    def cut(self, results: Sequence[Any], kinds: Sequence[Kind], length: int) -> list[Any]:
        """The results without what was computed of padding; those that are of kind `ours` as dense as they were."""
        return [_cut(*one, length) for one in zip(results, kinds, self._cuts, strict=True)]


def next_sizes(recorded: Iterable[RecordedSize], lazy: Mapping[int, CUDAGraphMode] | None = None) -> Dispatcher:
    """What picks a size among those that are recorded, and those that will be when they first come."""
    sizes = [(one.mode, one.num_tokens) for one in recorded if one.num_tokens is not None]
    sizes += [(mode, size) for size, mode in (lazy or {}).items()]
    modes = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE
    full, piecewise = (sorted({size for mode, size in sizes if mode is wanted}) for wanted in modes)
    return Dispatcher(CUDAGraphMode.FULL, full, piecewise)


def _cut(result: Any, kind: Kind, dims: tuple[int, ...], length: int) -> Any:
    if not dims or isinstance(kind, int):
        return result
    if not isinstance(result, torch.Tensor):
        return length
    steps = [step for step, size in zip(result.stride(), result.size(), strict=True) if size > 1]
    is_dense = all(result.size(dim) == length or result.stride(dim) >= max(steps, default=0) for dim in dims)
    for dim in dims:
        result = result.narrow(dim, 0, length)
    return result if is_dense or kind != "ours" else result.clone()


def _by_argument(graph: RecordedGraph, policies: Mapping[str, Policy]) -> dict[str, Policy]:
    """The policies by path, also for an argument that is passed at two places. Raises ConfigError."""
    arguments = {one.path: one for one in graph.arguments}
    found: dict[str, Policy] = {}
    for path, policy in policies.items():
        argument = arguments.get(path)
        if argument is None:
            raise ConfigError(
                f"cudagraph_padding has {path!r}, and no argument of that name has a dynamic dim",
                where=_WHERE,
                hint=nearest(path, arguments),
            )
        _refuse_unfit(argument, policy)
        first = argument.twin or path
        if found.setdefault(first, policy) != policy:
            raise ConfigError(
                f"{path} is the same tensor as {first}, whose padding is {found[first]}, and not {policy}",
                where=_WHERE,
                hint="give both the same policy",
            )
    return {path: found[one.twin or path] for path, one in arguments.items() if (one.twin or path) in found}


def _refuse_unfit(argument: SizedArgument, policy: Policy) -> None:
    if not fits(policy, argument.dtype):
        raise ConfigError(
            f"{argument.path} is {str(argument.dtype).removeprefix('torch.')}, which can't be {policy}",
            where=_WHERE,
            hint="give a number that the dtype has, or zero, last or keep",
        )
    if argument.refused is not None:
        raise ConfigError(
            f"{argument.path} can't be padded: it {argument.refused}",
            where=_WHERE,
            hint="give an example with memory of its own",
        )


def _padded_inputs(graph: RecordedGraph, policies: Mapping[str, Policy], dim: DynamicDim) -> list[PaddedInput]:
    arguments = {one.path: one for one in graph.arguments}
    found = []
    for index, (name, owner) in enumerate(zip(graph.names, graph.owners, strict=True)):
        argument = arguments.get(name)
        if argument is None or owner not in ("input", "step input"):
            continue
        if owner == "input":
            raise ConfigError(
                f"calls can't be padded: the module writes into {name}, which has the dim {dim.name}",
                where=_WHERE,
                hint="pad it yourself, or leave cudagraph_padding out",
            )
        if name not in policies:
            raise ConfigError(
                f"cudagraph_padding has no policy for {name}, which has the dim {dim.name} too",
                where=_WHERE,
                hint=f"give it one, such as {{{name!r}: 'zero'}}",
            )
        dims = tuple(place for place, length in enumerate(argument.shape) if length == dim.name)
        found.append(PaddedInput(index, dims, policies[name]))
    return found


def _result_dims(graph: RecordedGraph) -> list[tuple[int, ...] | None]:
    """For each result the dims that are as long as the declared dim; None where it follows from that otherwise."""
    plan = graph.plan
    lengths = plan.result_lengths or [("?",)] * len(plan.results)

    def dims(result: Any, lengths: tuple[str, ...]) -> tuple[int, ...] | None:
        if not isinstance(result, str) or result in plan.inputs:
            return ()  # what the caller has given, it gets
        if any(length != plan.size and not length.isdecimal() for length in lengths):
            return None
        return tuple(place for place, length in enumerate(lengths) if length == plan.size)

    return [dims(*pair) for pair in zip(plan.results, lengths, strict=True)]
