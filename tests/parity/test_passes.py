"""The parity suite with each pass alone off: every architecture gives transformers' tokens without any one of them.

Captured and split, without Inductor, so that the rewritten graphs themselves run; `--full` has them compiled too.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from onegraph import LLM, SamplingParams
from onegraph.passes.catalogue import CATALOGUE
from tests.architectures import ARCHITECTURES, make_model
from tests.reference import MAX_TIES, expected, is_tie, load_reference

pytestmark = pytest.mark.usefixtures("op_kernels")

PASSES = [entry.kind.name for entry in CATALOGUE]
PROMPTS = [[7], list(range(3, 24)), [5, 250, 31, 8, 9]]
MAX_TOKENS = 8


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {}


def tokens_without(name: str | None, folder: Path, backend: str) -> list[list[int]]:
    passes = {} if name is None else {name: False}
    llm = LLM(
        str(folder),
        dtype="float32",
        compilation_config={"backend": backend, "passes": passes},
        num_kv_blocks=64,
        block_size=8,
        max_num_batched_tokens=16,
        max_num_seqs=4,
    )
    ran = {one.name: one.rewrites for one in llm.explain().passes}
    assert set(ran) == set(PASSES) - {name}
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def check(architecture: str, name: str | None, backend: str, references: dict[str, Any], folder: Path) -> None:
    if architecture not in references:
        where = make_model(architecture, folder / architecture)
        reference = load_reference(where, torch.float32)
        wanted = [expected(reference, prompt, MAX_TOKENS) for prompt in PROMPTS]
        references[architecture] = where, copy.deepcopy(reference).double(), wanted
    where, reference64, wanted = references[architecture]
    found = tokens_without(name, where, backend)
    ties = sum(is_tie(reference64, prompt, got, want) for prompt, got, want in zip(PROMPTS, found, wanted, strict=True))
    assert ties <= MAX_TIES * sum(map(len, found))


PAIRS = [
    pytest.param(architecture, name, marks=[] if (at + number) % 4 == 0 else [pytest.mark.full])
    for at, architecture in enumerate(ARCHITECTURES)
    for number, name in enumerate([None, *PASSES])
]
"""Each architecture lacks two of the passes, and each pass is lacked by three architectures; `--full` has all pairs."""


@pytest.mark.parametrize(("architecture", "name"), PAIRS)
def test_tokens_with_one_pass_off(
    architecture: str, name: str | None, references: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(architecture, name, "eager", references, tmp_path_factory.mktemp("model"))


@pytest.mark.full
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_with_one_pass_off_compiled(
    architecture: str, name: str, references: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    check(architecture, name, "inductor", references, tmp_path_factory.mktemp("model"))
