"""Inductor's autotuning with the choices made by us: torch measures, and asks its cache of timings what is known.

`AlgorithmSelectorCache.lookup(choices, op, inputs, benchmark)` is the one place through which each choice of a kernel
goes (torch 2.11 to 2.13): before candidates are compiled (without `benchmark`), and to have them measured.
"""

from __future__ import annotations

import ast
import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch._inductor.config

from onegraph.ir.autotune import Choose, TuningQuestion

OFF: Mapping[str, Any] = {"max_autotune": False, "max_autotune_gemm": False}
"""The options with which Inductor measures nothing."""

_QUIET = {"max_autotune_report_choices_stats": False, "cpp_cache_precompile_headers": False}


def tunes(options: Mapping[str, Any]) -> bool:
    """Whether Inductor chooses kernels by measuring them, under these options on top of what is in force."""
    return any(options.get(name, getattr(torch._inductor.config, name)) for name in OFF)


@contextlib.contextmanager
def choosing(choose: Choose) -> Iterator[None]:
    """Inside, `choose` has the say in each choice of a kernel; what it raises comes out wrapped by torch."""
    from torch._inductor import select_algorithm  # takes a second to import

    def lookup(
        _: Any,
        choices: list[Any],
        op: str,
        inputs: str,
        benchmark: Callable[[Any], dict[Any, float]] | None,
        hint_override: int | None = None,
    ) -> dict[Any, float]:
        if benchmark is None:  # whether to compile the candidates now: on the CPU measuring them does it
            on_cpu = all(choice.layout.device.type == "cpu" for choice in choices)
            return dict.fromkeys(choices, 0.0) if on_cpu else {}
        names = _names(choices)
        asked = TuningQuestion(
            op=op if hint_override is None else f"{op} hint {hint_override}",
            inputs=_readable(inputs),
            candidates=names,
            sources=tuple(choice.hash_key() for choice in choices),
        )

        def measured() -> dict[str, float | None]:
            known = {name: value for name, value in _QUIET.items() if hasattr(torch._inductor.config, name)}
            with torch._inductor.config.patch(known), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's benchmarks use what torch deprecates
                milliseconds = benchmark(choices)
            return {name: _microseconds(milliseconds[one]) for name, one in zip(names, choices, strict=True)}

        chosen = choose(asked, measured)
        return {choices[names.index(chosen)]: 0.0}

    quiet = mock.patch.object(select_algorithm, "PRINT_AUTOTUNE", False)
    with mock.patch.object(select_algorithm.AlgorithmSelectorCache, "lookup", lookup), quiet:
        yield


def _names(choices: list[Any]) -> tuple[str, ...]:
    """The kernels' names without what differs between processes; equal ones are numbered."""
    names = [choice.hash_key().rsplit("-", 1)[0] for choice in choices]
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        seen[name] += 1
        if names.count(name) > 1:
            names[index] = f"{name}#{seen[name]}"
    return tuple(names)


def _readable(inputs: str) -> tuple[str, ...]:
    """`('cpu', 'torch.float32', 4, 8, 8, 1, 0)`, sizes before strides and offset, as `float32[4, 8] strides [8, 1]`."""
    try:
        nodes = ast.literal_eval(inputs)
    except (ValueError, SyntaxError):
        return (inputs,)
    texts = []
    for device, dtype, *numbers in nodes:
        dims = len(numbers) // 2
        offset = f" offset {numbers[-1]}" if numbers[-1] else ""
        place = "" if device == "cpu" else f" on {device}"
        text = f"{dtype.removeprefix('torch.')}{numbers[:dims]} strides {numbers[dims : 2 * dims]}{offset}{place}"
        texts.append(text)
    return tuple(texts)


def _microseconds(milliseconds: float) -> float | None:
    return round(milliseconds * 1000, 3) if math.isfinite(milliseconds) else None
