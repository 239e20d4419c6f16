"""Logits of a flat batch against transformers' own forward, each request alone: all rows, not only the likeliest.

Three requests of different lengths, in steps that mix chunks of prompts with single tokens, over a paged cache
whose blocks are shuffled and hold NaN wherever nothing was written, with padded rows. Prompts are longer than the
sliding windows.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from onegraph.models import LoadedModel, load_model
from tests.architectures import ARCHITECTURES, byte_tokenizer, make_model
from tests.reference import load_reference

LENGTHS = (3, 21, 40)
STEPS = ((2, 9, 20), (1, 1, 1), (0, 10, 18), (0, 1, 1))
"""New tokens of each request in each step: together the lengths."""
BLOCK_SIZE, NUM_BLOCKS, PADDING = 4, 24, 2
FP32_TOLERANCE = 2e-5
"""Of the largest logit; seen are 5e-7 to 3e-6."""


@dataclass
class Batch:
    """The tokens of the requests, and the shuffled blocks of their contexts."""

    ids: list[list[int]]
    tables: list[list[int]]

    @staticmethod
    def draw(seed: str) -> Batch:
        rng = random.Random(seed)
        blocks = list(range(1, NUM_BLOCKS))
        rng.shuffle(blocks)
        tables = [[blocks.pop() for _ in range(-(-length // BLOCK_SIZE))] for length in LENGTHS]
        return Batch([[rng.randrange(256) for _ in range(length)] for length in LENGTHS], tables)


def flat_logits(model: LoadedModel, batch: Batch) -> list[torch.Tensor]:
    """Logits [length, V] of each request, put together from the steps."""
    kv, longest = model.kv, max(len(table) for table in batch.tables)
    shape = (NUM_BLOCKS, BLOCK_SIZE, kv.num_kv_heads, kv.head_dim)
    caches = [tuple(torch.full(shape, torch.nan, dtype=kv.dtype) for _ in "kv") for _ in range(kv.num_layers)]
    tables = torch.tensor([table + [0] * (longest - len(table)) for table in batch.tables], dtype=torch.int32)
    rows: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    done = [0] * len(LENGTHS)
    for step in STEPS:
        places = [(r, done[r] + i) for r, new in enumerate(step) for i in range(new)]
        done = [old + new for old, new in zip(done, step, strict=True)]
        slots = [batch.tables[r][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for r, p in places]
        starts = [sum(step[:r]) for r in range(len(step) + 1)]
        with torch.no_grad():
            logits = model.module(
                torch.tensor([batch.ids[r][p] for r, p in places] + [0] * PADDING),
                torch.tensor([p for _, p in places] + [0] * PADDING),
                slot_mapping=torch.tensor(slots + [-1] * PADDING),
                query_start_loc=torch.tensor(starts, dtype=torch.int32),
                seq_lens=torch.tensor(done, dtype=torch.int32),
                block_tables=tables,
                logits_indices=torch.arange(len(places)),
                kv_caches=caches,
            )
        for (r, _), row in zip(places, logits, strict=True):
            rows[r].append(row)
    return [torch.stack(of_request) for of_request in rows]


def alone(reference: Any, batch: Batch) -> list[torch.Tensor]:
    with torch.no_grad():
        return [reference(torch.tensor([ids]), use_cache=False).logits[0] for ids in batch.ids]


def error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest difference, as a part of the largest logit."""
    exact = torch.cat(want).double()
    return float((torch.cat(got).double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp32_logits_equal_transformers(architecture: str, tmp_path: Path) -> None:
    folder = make_model(architecture, tmp_path)
    batch = Batch.draw(architecture)
    assert error(flat_logits(load_model(folder), batch), alone(load_reference(folder, torch.float32), batch)) < (
        FP32_TOLERANCE
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_logits_are_as_near_to_fp64_as_transformers_own(architecture: str, tmp_path: Path) -> None:
    """At most twice transformers' own error against fp64 with the same weights, or 2% of the largest logit."""
    folder = make_model(architecture, tmp_path, dtype=torch.bfloat16)
    batch = Batch.draw(architecture)
    theirs = load_reference(folder, torch.bfloat16)
    truth = alone(copy.deepcopy(theirs).double(), batch)
    assert error(flat_logits(load_model(folder), batch), truth) < max(2 * error(alone(theirs, batch), truth), 0.02)


def test_sinks_are_understood_outside_of_the_proven_architectures(tmp_path: Path) -> None:
    """gpt_oss hands each layer's sinks to attention, and alternates windows."""
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=258, max_position_embeddings=64, num_local_experts=4,
        num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"], sliding_window=8,
        pad_token_id=None, eos_token_id=256,
    )  # fmt: skip
    config.initializer_range = 0.2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    batch = Batch.draw("gpt_oss")
    assert error(flat_logits(load_model(tmp_path), batch), alone(model.eval(), batch)) < FP32_TOLERANCE
