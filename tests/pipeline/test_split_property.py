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

import pytest
import torch
from torch.export import Dim

import onegraph
import onegraph.pipeline
from onegraph.split.split import called_ops
from tests.compiled_parts import EAGERS_BITS
from tests.pipeline.drawn_programs import STATEMENTS, draw_program

NUM_CASES, NUM_INDUCTOR_CASES = 300, 20
ROWS = {"x": {0: Dim("rows", min=1, max=64)}}


def loaded(seed: int, folder: Path) -> tuple[Callable[..., Any], list[str]]:
    source, used = draw_program(seed)
    path = folder / f"program_{seed}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.program, used


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


def check_case(seed: int, folder: Path, backend: str) -> tuple[list[str], int]:
    """The statements of the case, and the number of its pieces."""
    program, used = loaded(seed, folder)
    random = Random(seed)
    captured = []
    split_graph = onegraph.pipeline.split_graph

    def keeping(graph: Any, ops: Any) -> Any:
        captured.append(called_ops(graph))
        return split_graph(graph, ops)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onegraph.pipeline, "split_graph", keeping)
        whole = onegraph.compile(
            program, dynamic_shapes=ROWS, config={"backend": "eager", "passes": EAGERS_BITS, "splitting_ops": []}
        )
        ran(whole, 5)
    ops = random.sample(captured[0], min(len(captured[0]), random.randint(1, 3)))
    config: dict[str, Any] = {"backend": backend, "passes": EAGERS_BITS, "splitting_ops": ops}
    if backend == "aot_eager":
        config |= drawn_regions(random)
    elif backend == "inductor" and random.random() < 0.5:
        config["compile_sizes"] = [random.choice([1, 5])]
    split = onegraph.compile(program, dynamic_shapes=ROWS, config=config)
    exact = {"rtol": 0, "atol": 0} if backend == "eager" else {"rtol": 1e-4, "atol": 1e-5}
    earlier: list[tuple[Any, Any]] = []
    for rows in (5, 1, 2, 64, 5):
        (found, after), (expected, eager_after) = ran(split, rows), ran(program, rows)
        assert [type(one) for one in found] == [type(one) for one in expected]
        told = f"seed {seed}, {config}, {rows} rows\n{draw_program(seed)[0]}"
        torch.testing.assert_close(after, eager_after, **exact, msg=lambda text, told=told: f"{text}\n{told}")
        assert sharing(after) == sharing(eager_after), told
        earlier.append((after, [tensor.clone() for tensor in after]))
    for kept, then in earlier:  # no call has written into what an earlier one gave
        torch.testing.assert_close(kept, then, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{text}\n{told}")
    return used, len(split.explain().pieces)


@pytest.mark.timeout(1800)
def test_split_equals_eager(tmp_path: Path) -> None:
    used: Counter[str] = Counter()
    num_pieces = 0
    for seed in range(NUM_CASES):
        backend = "aot_eager" if seed % 3 == 2 else "eager"
        kinds, pieces = check_case(seed, tmp_path, backend)
        used.update(kinds)
        num_pieces += pieces
    assert set(used) == set(STATEMENTS) and min(used.values()) >= 10, used
    assert num_pieces > 3 * NUM_CASES


@pytest.mark.timeout(1800)
def test_split_equals_eager_with_inductor(tmp_path: Path) -> None:
    for seed in range(10_000, 10_000 + NUM_INDUCTOR_CASES):
        check_case(seed, tmp_path, "inductor")
