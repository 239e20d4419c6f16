"""The passes over all architectures: each pass's piece is checked in fp64, and generated tokens stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onegraph import LLM, SamplingParams
from onegraph.passes.catalogue import CATALOGUE
from tests.architectures import ARCHITECTURES, make_model

NO_PASSES = {entry.kind.name: False for entry in CATALOGUE}
NO_ROTARY = {
    "gpt2": "has none",
    "opt": "has none",
    "glm4": "turns pairs that lie side by side",
}


def generated(folder: Path, **config: object) -> tuple[list[list[int]], dict[str, int]]:
    """Tokens, and how often each pass rewrote something. Both of an LLM without Inductor."""
    llm = LLM(str(folder), max_model_len=128, compilation_config={"backend": "eager", **config})
    outputs = llm.generate(["a short one", "and one that is longer"], SamplingParams(temperature=0, max_tokens=6))
    rewrites = {one.name: one.rewrites for one in llm.explain().passes}
    return [list(one.outputs[0].token_ids) for one in outputs], rewrites


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checked_passes_keep_what_a_model_computes(architecture: str, tmp_path: Path) -> None:
    folder = make_model(architecture, tmp_path / architecture, dtype=torch.float32)
    found, rewrites = generated(folder, check_passes=True)
    wanted, none = generated(folder, passes=NO_PASSES)
    assert found == wanted
    assert not any(none.values())
    assert rewrites["remove_no_ops"]
    turns = 0 if architecture in NO_ROTARY else 2
    assert (rewrites["fuse_rotary"], rewrites["move_rotary"]) == (turns, turns)
