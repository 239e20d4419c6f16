"""The parity suite: every architecture, each way of running it, the same tokens as transformers.

A first difference is allowed only between tokens whose fp64 logits are nearer than a stated tolerance, and such
ties are counted. Prompts of different lengths are served together, in steps smaller than the longest of them.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from onegraph import LLM, SamplingParams
from onegraph.counters import counters
from tests.architectures import ARCHITECTURES, make_model
from tests.reference import MAX_TIES, expected, is_tie, load_reference

pytestmark = pytest.mark.usefixtures("op_kernels")

WAYS = ("eager", "unsplit", "split", "specialised", "warm", "recorded")
SIZE = 4
"""Tokens of a step that gets artifacts of its own: one of each running sequence."""
PROMPT_LENGTHS = (1, 4, 13, 21, 40)
MAX_TOKENS = 12
ENGINE = {"num_kv_blocks": 64, "block_size": 8, "max_num_batched_tokens": 32, "max_num_seqs": 4}


@dataclass
class Case:
    """One architecture: its folder, its own compile cache, and what transformers makes of the prompts."""

    folder: Path
    cache: Path
    reference64: Any
    prompts: list[list[int]]
    wanted: list[list[int]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {}


@pytest.fixture
def case(
    architecture: str,
    cases: dict[str, Case],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Case:
    if architecture not in cases:
        folder = make_model(architecture, tmp_path_factory.mktemp(architecture))
        reference = load_reference(folder, torch.float32)
        rng = random.Random(architecture)
        prompts = [[rng.randrange(256) for _ in range(length)] for length in PROMPT_LENGTHS]
        cases[architecture] = Case(
            folder=folder,
            cache=tmp_path_factory.mktemp("cache") / "root",
            reference64=copy.deepcopy(reference).double(),
            prompts=prompts,
            wanted=[expected(reference, prompt, MAX_TOKENS) for prompt in prompts],
        )
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(cases[architecture].cache))
    return cases[architecture]


def run(case: Case, way: str) -> tuple[LLM, Any]:
    """An engine that runs in one of the ways, and its outputs."""
    config = {
        "unsplit": {"splitting_ops": []},
        "specialised": {"compile_sizes": [SIZE]},
        "warm": {"compile_sizes": [SIZE]},
        "recorded": {"cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 32]},
    }
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    with counters.expect(**{"inductor_compiles": 0, "gxx_runs": 0} if way in ("eager", "warm", "recorded") else {}):
        llm = LLM(
            str(case.folder),
            dtype="float32",
            enforce_eager=way == "eager",
            compilation_config=config.get(way),
            **ENGINE,
        )
        outputs = llm.generate([{"prompt_token_ids": p} for p in case.prompts], params, use_tqdm=False)
    return llm, outputs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_transformers(case: Case, architecture: str, way: str) -> None:
    if way == "warm":
        run(case, "specialised")
    if way == "recorded":
        run(case, "split")
    with counters.expect(graphs_captured=0 if way in ("eager", "warm", "recorded") else 1):
        llm, outputs = run(case, way)
    pieces = [piece for piece in llm.explain().pieces if piece.kind == "compiled" and piece.same_as is None]
    stores = [one.store for piece in pieces for one in piece.ranges]
    assert way == "eager" or all(piece.backend == "inductor" for piece in pieces)
    if way in ("warm", "recorded"):
        assert set(stores) == {"hit"}
    if way == "recorded":
        sizes = [(one.num_tokens, one.mode.name) for one in llm.explain().recorded]
        assert sizes == [
            (n, mode) for n in (1, 2, 4, 32) for mode in ("FULL", "PIECEWISE") if (n, mode) != (32, "FULL")
        ]
    if way == "unsplit":
        assert len(pieces) == len(stores) == 1
    if way in ("specialised", "warm"):
        assert all([one.predicate for one in piece.ranges] == [f"num_tokens == {SIZE}", None] for piece in pieces)
    elif way == "split":
        assert len(pieces) == len(stores) >= 3
    num_tokens = ties = 0
    for prompt, want, output in zip(case.prompts, case.wanted, outputs, strict=True):
        got = list(output.outputs[0].token_ids)
        ties += is_tie(case.reference64, prompt, got, want)
        num_tokens += len(got)
    assert ties <= MAX_TIES * num_tokens, f"{ties} ties in {num_tokens} tokens"


@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_is_as_near_to_the_truth_as_transformers_own(
    architecture: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against fp64 logits of the same bf16 weights: our error is at most twice transformers' own, or 2% of them."""
    monkeypatch.setenv("ONEGRAPH_CACHE_ROOT", str(tmp_path / "cache"))
    folder = make_model(architecture, tmp_path / "model", dtype=torch.bfloat16)
    theirs = load_reference(folder, torch.bfloat16)
    truth = copy.deepcopy(theirs).double()
    rng = random.Random(architecture)
    prompt = [rng.randrange(256) for _ in range(24)]
    llm = LLM(str(folder), enforce_eager=way == "eager", **ENGINE)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=5)
    (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    with torch.no_grad():
        exact = torch.log_softmax(truth(torch.tensor([prompt])).logits[0], -1)
        rounded = torch.log_softmax(theirs(torch.tensor([prompt])).logits[0].double(), -1)
    ours, own = 0.0, float((rounded - exact).abs().max())
    for position, entries in enumerate(output.prompt_logprobs[1:]):
        for token, entry in entries.items():
            ours = max(ours, abs(entry.logprob - float(exact[position, token])))
    assert ours <= max(2 * own, 0.02 * float(exact.abs().max())), f"error {ours}, transformers' own {own}"
