"""Whether a pass kept what a piece computes: both graphs run on sample data, judged by fp64 through `numerics`.

The sample sizes are small ones that the graph was traced for; whole numbers are 0 and 1, which any table has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from onegraph.counters import counters
from onegraph.errors import CompileError
from onegraph.ir.piece import Piece
from onegraph.log import get_logger
from onegraph.numerics.compare import compare, uninitialised
from onegraph.torch_compat import fake_runs
from onegraph.torch_compat.op_modes import FilledMemory, InFloat64

log = get_logger(__name__)

_SAMPLE_SIZE = 5
"""Odd, and no size that a kernel would be made for."""


def check_rewrite(
    name: str,
    piece: Piece,
    before: torch.fx.GraphModule,
    after: torch.fx.GraphModule,
    sources: Mapping[int, tuple[int, ...]],
) -> None:
    """Raises CompileError where `after` isn't as near to the truth as `before`.

    `after` may have more inputs: `sources` gives for each of those, by index, the inputs whose rows it has. A piece
    that refuses the sample data, such as one with attention inside, whose block tables it isn't, is left unchecked
    with a warning.
    """
    samples = sample_inputs(piece)
    num_given, all_samples = len(before.graph.find_nodes(op="placeholder")), list(samples)
    for index in sorted(sources):
        all_samples.insert(index, torch.cat([samples[one] for one in sources[index]]))

    def run(graph_module: torch.fx.GraphModule) -> Any:
        inputs = [one.clone() if isinstance(one, torch.Tensor) else one for one in all_samples]
        given = inputs[:num_given] if graph_module is before else inputs
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            results = graph_module(*given)
        return [list(results), [one for one in given[: len(samples)] if isinstance(one, torch.Tensor)]]

    def filled(value: float) -> Any:
        with FilledMemory(value):
            return run(before)

    try:
        wanted = run(before)
    except Exception as error:  # noqa: BLE001 - whatever an op says of data that means nothing to it
        counters.add("passes_unchecked")
        log.warning("piece %d can't be run on sample data, so %s isn't checked: %s", piece.index, name, error)
        return
    found = run(after)
    with InFloat64():
        truth = run(before)
    judged = compare(found, wanted, truth, uninitialised(filled(1.0), filled(-3.0)))
    if not judged.ok:
        raise CompileError(
            f"the pass {name} changes what piece {piece.index} computes: error {judged.max_error:.2g} against fp64, "
            f"{judged.eager_error:.2g} without it; {judged.where}",
            where=f"piece {piece.index} {piece.module_path}",
            hint=f"-O.passes.{name}=false leaves it out",
        )


def sample_inputs(piece: Piece) -> list[Any]:
    """Real inputs like the piece's fake ones, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    ranges = fake_runs.symbol_ranges(list(piece.fake_inputs))
    sizes = {
        symbol: max(least, min(_SAMPLE_SIZE + index, _SAMPLE_SIZE + index if most is None else most))
        for index, (symbol, (least, most)) in enumerate(ranges.items())
    }
    return [_sample(value, sizes, generator) for value in piece.fake_inputs]


def _sample(value: Any, sizes: Mapping[Any, int], generator: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor):
        return fake_runs.size_at(value, sizes) if isinstance(value, torch.SymInt) else value
    shape = [fake_runs.size_at(one, sizes) for one in value.shape]
    stride = [fake_runs.size_at(one, sizes) for one in value.stride()]
    real = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    if value.is_floating_point() or value.is_complex():
        return real.copy_(torch.randn(shape, generator=generator, dtype=torch.float32))
    return real.copy_(torch.randint(0, 2, shape, generator=generator))
