"""What a call costs before the first kernel: input contract and state checks, beside stock torch.compile's guards.

usage: python -m bench.call_cost [--rounds 60] [--name NAME] [--out FILE]

30 tiny layers, and four flat tensors through one addition, both with `backend=eager` so that all run the same
operators. `checks` are timed alone, too: the contract in front of an empty function, and the state check by itself.
All are called in turns in one process, so that other load meets them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

import onegraph
from bench.__main__ import RESULTS, environment
from onegraph.capture import capture as capture_stage
from onegraph.ir.graph import CapturedGraph

LAYERS, HIDDEN, MAX_TOKENS, CALLS = 30, 8, 64, 50


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(HIDDEN, HIDDEN), 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x)) * self.scale + x


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def four(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    return a + b + c + d


def captured_and_compiled(module: Any, shapes: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[CapturedGraph, Any]:
    """The graph of a compile, and the compiled model."""
    kept: list[CapturedGraph] = []
    original = capture_stage._captured_graph

    def keeping(*args: Any, **kwargs: Any) -> CapturedGraph:
        kept.append(original(*args, **kwargs))
        return kept[-1]

    capture_stage._captured_graph = keeping
    os.environ["ONEGRAPH_DISABLE_COMPILE_CACHE"] = "1"  # from the index there would be no graph
    try:
        compiled = onegraph.compile(module, dynamic_shapes=shapes, config={"backend": "eager"})
        compiled(*arguments)
    finally:
        capture_stage._captured_graph = original
    return kept[0], compiled


def variants(module: Any, names: str, arguments: tuple[torch.Tensor, ...]) -> tuple[dict[str, Callable[[], Any]], int]:
    """The functions to time, without arguments, and the number of the ledger's reads of state."""
    tokens = Dim("tokens", min=1, max=MAX_TOKENS)
    shapes = {name: {0: tokens} for name in names}
    captured, compiled = captured_and_compiled(module, shapes, arguments)
    frozen = onegraph.compile(module, dynamic_shapes=shapes, config={"backend": "eager", "freeze": True})
    torch._dynamo.mark_dynamic(arguments[0], 0, min=2, max=MAX_TOKENS)
    stock = torch.compile(module, backend="eager", dynamic=True)
    graph = captured.graph_module
    weights = [weight.holder[weight.key] for weight in captured.weights]
    sizes = [value for value in captured.fake_inputs[len(weights) :] if not isinstance(value, torch.Tensor)]
    inputs = [*weights, *(arguments[0].shape[0] for _ in sizes), *arguments]
    empty = captured.bind_entry([(None, lambda *given: None)])
    functions: dict[str, Callable[[], Any]] = {
        "bare graph": lambda: graph(*inputs),
        "onegraph": lambda: compiled(*arguments),
        "onegraph, freeze": lambda: frozen(*arguments),
        "torch.compile": lambda: stock(*arguments),
        "checks: contract": lambda: empty(*arguments),
        "checks: state": compiled._current.holds,
        "checks: empty call": lambda: (lambda *given: None)(*arguments),
    }
    expected = graph(*inputs)[0]
    for name, function in functions.items():
        if not name.startswith("checks"):
            result = function()
            torch.testing.assert_close(result[0] if isinstance(result, tuple) else result, expected)
    return functions, len(captured.state)


def timed(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds per call: median and quartiles over the rounds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            function = functions[name]
            began = time.perf_counter()
            for _ in range(CALLS):
                function()
            times[name].append((time.perf_counter() - began) / CALLS * 1e6)
    found = {}
    for name, values in times.items():
        quarter, median, three = statistics.quantiles(values, n=4)
        found[name] = {"median": round(median, 2), "q1": round(quarter, 2), "q3": round(three, 2)}
    return found


def main() -> int:
    """Measures, writes bench/results/DATE-call-cost[-NAME].json, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.call_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--name", default="", help="ends the file's name, where a day has several runs")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    stem = "-".join(part for part in (date.today().isoformat(), "call-cost", options.name) if part)
    out = options.out or RESULTS / f"{stem}.json"
    if out.exists():
        parser.error(f"{out.name} exists, and results are kept as measured: give another --name or --out")
    torch.set_num_threads(1)
    facts: dict[str, Any] = {"environment": environment(), "microseconds": {}}
    cases = {
        f"{LAYERS} tiny layers": (Tower().eval(), "x", (torch.randn(4, HIDDEN),)),
        "4 flat tensors": (four, "abcd", tuple(torch.randn(4, HIDDEN) for _ in range(4))),
    }
    with torch.no_grad():
        for title, (module, names, arguments) in cases.items():
            functions, num_reads = variants(module, names, arguments)
            found = timed(functions, options.rounds)
            facts["microseconds"][title] = {"state_reads": num_reads, **found}
            print(f"{title}, {num_reads} reads of state")
            for name, entry in found.items():
                print(f"  {name:<20} {entry['median']:>9.2f} µs  ({entry['q1']:.2f} to {entry['q3']:.2f})")
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
