"""Sizing the KV cache, and the limits that follow from it."""

from pathlib import Path

import pytest
import torch

from onegraph.config.engine import EngineConfig
from onegraph.engine.kv_cache import (
    KVCachePlan,
    LayerKV,
    allocate_kv_caches,
    plan_kv_cache,
)
from onegraph.engine.limits import resolve_limits
from onegraph.errors import ConfigError
from onegraph.targets.cpu.memory import available_bytes, zeros_on_demand

LAYERS = [LayerKV(2, 8, torch.bfloat16), LayerKV(1, 8, torch.float32)]
BLOCK_BYTES = 16 * (2 * 2 * 8 * 2 + 2 * 1 * 8 * 4)


def plan(available: int | None, **changes) -> KVCachePlan:
    arguments = {"block_size": 16, "max_num_seqs": 4, "max_model_len": 100, "num_kv_blocks": None} | changes
    return plan_kv_cache(LAYERS, available_bytes=lambda: available, **arguments)


def test_as_much_as_the_sequences_can_use_or_half_of_the_memory():
    roomy = plan(2**40)
    assert roomy.num_blocks == 4 * 7 and roomy.block_bytes == BLOCK_BYTES and "4 sequences of 100 tokens" in str(roomy)
    tight = plan(BLOCK_BYTES * 11)
    assert tight.num_blocks == 5 and "50% of" in tight.why
    assert plan(BLOCK_BYTES * 11, num_kv_blocks=9).num_blocks == 9


def test_what_does_not_fit_is_an_error_with_numbers():
    with pytest.raises(ConfigError, match="no KV block fits"):
        plan(BLOCK_BYTES)
    with pytest.raises(ConfigError, match=r"num_kv_blocks=12 needs(.|\n)*num_kv_blocks=11"):
        plan(BLOCK_BYTES * 11, num_kv_blocks=12)


def test_the_tensors():
    caches = allocate_kv_caches(LAYERS, plan(2**40, num_kv_blocks=3), zeros_on_demand)
    assert [(k.shape, k.dtype, v.shape) for k, v in caches] == [
        ((3, 16, 2, 8), torch.bfloat16, (3, 16, 2, 8)),
        ((3, 16, 1, 8), torch.float32, (3, 16, 1, 8)),
    ]
    tensors = [tensor for pair in caches for tensor in pair]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 4
    assert all(tensor.is_inference() and tensor.data_ptr() % 64 == 0 and not tensor.any() for tensor in tensors)


def test_the_memory_that_is_there(tmp_path: Path):
    assert available_bytes() > 2**20
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4096 kB\n")
    assert available_bytes(tmp_path) == 4096 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("100\n")
    assert available_bytes(tmp_path) == 4096 * 1024
    (group / "memory.max").write_text("1000\n")
    assert available_bytes(tmp_path) == 900
    (group / "memory.stat").write_text("anon 1\ninactive_file 30\n")
    assert available_bytes(tmp_path) == 930
    assert available_bytes(tmp_path / "nothing") is None


def test_where_the_memory_is_not_known_the_blocks_must_be_given():
    with pytest.raises(ConfigError, match="num_kv_blocks"):
        plan(None)
    assert plan(None, num_kv_blocks=5).num_blocks == 5


def limits(model_len: int = 100, **config):
    return resolve_limits(EngineConfig(**config), model_len=model_len, layers=LAYERS, available_bytes=lambda: 2**30)


def test_limits():
    default = limits()
    assert (default.max_model_len, default.max_num_batched_tokens, default.max_blocks_per_seq) == (
        100,
        2048,
        7,
    )
    assert limits(max_model_len=50, block_size=8).max_blocks_per_seq == 7
    with pytest.raises(ConfigError, match="max_model_len=101 is more than the 100"):
        limits(max_model_len=101)


def test_few_blocks_lower_a_default_length_and_refuse_one_that_was_asked_for():
    lowered = limits(num_kv_blocks=3)
    assert lowered.compiled_blocks_per_seq == limits().compiled_blocks_per_seq == 7, "another memory, the same model"
    assert lowered.max_model_len == 48 and "48, not the model's 100" in lowered.downgrades[0]
    with pytest.raises(ConfigError, match=r"max_model_len=100 does not fit: 3 KV blocks of 16 tokens hold 48 tokens"):
        limits(num_kv_blocks=3, max_model_len=100)
    assert limits(num_kv_blocks=3, max_model_len=48).downgrades == ()
