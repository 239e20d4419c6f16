"""What recordings know of a graph: its plan, the pieces, and where each of the plan's inputs belongs.

Takes a plan with the names of its inputs. An input with a declared dim is a step input, which is filled anew for each
call, unless the graph writes into it: memory that is written, as a KV cache, and all else stays where it lies. Without
declared dims all inputs that aren't written are step inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onegraph.ir.artifact import PieceCallable
from onegraph.ir.dims import SizedArgument
from onegraph.ir.plan import ExecutionPlan
from onegraph.plan.function import function_regions, region_of

UserLine = Callable[[int, str], str | None]
"""The user's line that called an op (by its name) in a piece; None where it isn't known."""


@dataclass(frozen=True)
class RecordedGraph:
    """`names` and `owners` are those of the plan's inputs, `owners` being `weight`, `input`, `step input` or `size`.

    `run` is the plan's function. `unrecordable` are pieces, by index, that mustn't be recorded, and why.
    """

    plan: ExecutionPlan
    run: Callable[..., Any]
    names: tuple[str, ...]
    owners: tuple[str, ...]
    unrecordable: Mapping[int, str]
    user_line: UserLine
    arguments: tuple[SizedArgument, ...] = ()
    """The arguments with declared dims; those that the graph takes are in `names` by their paths."""

    @property
    def regions(self) -> list[list[PieceCallable]]:
        """The pieces' callables for each part of the sizes."""
        return function_regions(self.run)

    def region_of(self, size: int | None) -> int:
        """The part that has a size of the first dim."""
        return region_of(self.run, size)


def recorded_graph(
    plan: ExecutionPlan,
    run: Callable[..., Any],
    *,
    weights: Sequence[str],
    input_names: Sequence[str],
    is_tensor: Sequence[bool],
    sized: Iterable[SizedArgument],
    unrecordable: Mapping[int, str],
    user_line: UserLine,
) -> RecordedGraph:
    """`weights` names the plan's first inputs, `input_names` the others, as Dynamo does."""
    arguments = tuple(sized)
    paths = {source: argument.path for argument in arguments for source in argument.sources}
    names = [paths.get(name) or re.sub(r"^L\['(\w+)'\]", r"\1", name) for name in input_names]
    owners = ["weight"] * len(weights)
    for place, (source, is_one) in enumerate(zip(input_names, is_tensor, strict=True), len(weights)):
        is_step = (source in paths or not paths) and plan.inputs[place] not in plan.written
        owners.append("size" if not is_one else "step input" if is_step else "input")
    return RecordedGraph(
        plan=plan,
        run=run,
        names=(*weights, *names),
        owners=tuple(owners),
        unrecordable=unrecordable,
        user_line=user_line,
        arguments=arguments,
    )
