"""Puts an engine together from its parts.

Takes: a callable with the flat model's forward, and what it was loaded with. Gives: an `Engine` with its own
KV cache.
"""

from collections.abc import Sequence

from onegraph.engine.block_tables import BlockTables
from onegraph.engine.engine import Engine
from onegraph.engine.kv_blocks import BlockPool
from onegraph.engine.kv_cache import LayerKV, allocate_kv_caches
from onegraph.engine.limits import Limits
from onegraph.engine.runner import Model, Runner
from onegraph.engine.scheduler import Scheduler
from onegraph.engine.text import Text
from onegraph.ir.target import Target


def assemble_engine(
    model: Model,
    *,
    layers: Sequence[LayerKV],
    limits: Limits,
    text: Text,
    vocab_size: int,
    eos_token_ids: frozenset[int],
    target: Target,
    enable_prefix_caching: bool = True,
    seed: int = 0,
) -> Engine:
    """The engine for one model, which lies on the target's device; `limits` come from `resolve_limits`."""
    tables = BlockTables(limits.max_num_seqs, limits.max_blocks_per_seq)
    scheduler = Scheduler(
        BlockPool(limits.kv_cache.num_blocks, limits.block_size),
        tables,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
    )
    runner = Runner(
        model,
        allocate_kv_caches(layers, limits.kv_cache, target.zeros),
        tables,
        block_size=limits.block_size,
        max_num_tokens=limits.max_num_batched_tokens,
    )
    return Engine(
        limits=limits,
        scheduler=scheduler,
        runner=runner,
        text=text,
        vocab_size=vocab_size,
        eos_token_ids=eos_token_ids,
        seed=seed,
    )
