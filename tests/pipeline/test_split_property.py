"""The property of splitting: whatever the splitting ops, a program cut into pieces computes what it computes whole.

Each case is a drawn program with splitting ops drawn from what it calls, and where it is compiled with sizes and
ranges that get artifacts of their own. Split and eager see the same arguments and
random streams; results, changed arguments and what shares memory with what must be equal at several sizes, and stay so.
"""

import importlib.util
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from torch.export import Dim

import onegraph
import onegraph.pipeline
from onegraph.ir.graph import CapturedGraph
from onegraph.split.split import called_ops
from tests.compiled_parts import EAGERS_BITS
from tests.pipeline.drawn_programs import STATEMENTS, draw_program

NUM_CASES, NUM_INDUCTOR_CASES, NUM_PARTS = 300, 20, 4
ROWS = {"x": {0: Dim("rows", min=1, max=64)}}


def loaded(seed: int, folder: Path) -> Callable[..., Any]:
    path = folder / f"program_{seed}.py"
    path.write_text(draw_program(seed)[0])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    program: Callable[..., Any] = module.program
    return program


def ran(function: Callable[..., Any], rows: int) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """The results, and the argument and results together."""
    generator = torch.Generator().manual_seed(rows)
    x, w = torch.randn(rows, 4, generator=generator), torch.randn(4, 4, generator=generator)
    torch.manual_seed(rows)
    with torch.no_grad():
        results = function(x, w)
    return results, [x, *results]


def sharing(tensors: list[torch.Tensor]) -> list[bool]:
    return [
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a, b in itertools.combinations(tensors, 2)
    ]


def drawn_regions(random: Random) -> dict[str, Any]:
    """Sizes and ranges with artifacts of their own, for half of the cases."""
    if random.random() < 0.5:
        return {}
    return {
        "compile_sizes": random.sample([1, 2, 5, 64], random.randint(1, 2)),
        "compile_ranges": random.choice([[], [3], [1, 8], [[2, 10]]]),
    }


class TracedError(Exception):
    """Ends a build that was begun for its trace alone."""


def traced(program: Callable[..., Any]) -> CapturedGraph:
    """What is traced of the program, whatever its splitting ops."""
    found = []
    capture = onegraph.pipeline.capture

    def only_capture(*args: Any, **kwargs: Any) -> None:
        found.append(capture(*args, **kwargs))
        raise TracedError

    whole = onegraph.compile(program, dynamic_shapes=ROWS, config={"backend": "eager", "splitting_ops": []})
    with mock.patch.object(onegraph.pipeline, "capture", only_capture), pytest.raises(TracedError):
        ran(whole, 5)
    return found[0]


def check_case(seed: int, folder: Path, backend: str) -> int:
    """The number of the case's pieces."""
    program = loaded(seed, folder)
    random = Random(seed)
    captured = traced(program)
    called = called_ops(captured)
    ops = random.sample(called, min(len(called), random.randint(1, 3)))
    config: dict[str, Any] = {"backend": backend, "passes": EAGERS_BITS, "splitting_ops": ops}
    if backend == "aot_eager":
        config |= drawn_regions(random)
    elif backend == "inductor" and random.random() < 0.5:
        config["compile_sizes"] = [random.choice([1, 5])]
    split = onegraph.compile(program, dynamic_shapes=ROWS, config=config)
    exact = {"rtol": 0, "atol": 0} if backend == "eager" else {"rtol": 1e-4, "atol": 1e-5}
    earlier: list[tuple[Any, Any]] = []
    with mock.patch.object(onegraph.pipeline, "capture", side_effect=[captured]):
        for rows in (5, 1, 2, 64, 5):
            (found, after), (expected, eager_after) = ran(split, rows), ran(program, rows)
            assert [type(one) for one in found] == [type(one) for one in expected]
            told = f"seed {seed}, {config}, {rows} rows\n{draw_program(seed)[0]}"
            torch.testing.assert_close(after, eager_after, **exact, msg=lambda text, told=told: f"{text}\n{told}")
            assert sharing(after) == sharing(eager_after), told
            earlier.append((after, [tensor.clone() for tensor in after]))
    for kept, then in earlier:  # no call has written into what an earlier one gave
        torch.testing.assert_close(kept, then, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{text}\n{told}")
    return len(split.explain().pieces)


def test_every_statement_is_drawn() -> None:
    used = Counter(kind for seed in range(NUM_CASES) for kind in draw_program(seed)[1])
    assert set(used) == set(STATEMENTS) and min(used.values()) >= 10, used


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_split_equals_eager(part: int, tmp_path: Path) -> None:
    seeds = range(part, NUM_CASES, NUM_PARTS)
    backends = ["aot_eager" if seed % 3 == 2 else "eager" for seed in seeds]
    num_pieces = sum(check_case(seed, tmp_path, backend) for seed, backend in zip(seeds, backends, strict=True))
    assert num_pieces > 3 * len(seeds)


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_split_equals_eager_with_inductor(part: int, tmp_path: Path) -> None:
    for seed in range(10_000 + part, 10_000 + NUM_INDUCTOR_CASES, NUM_PARTS):
        check_case(seed, tmp_path, "inductor")
