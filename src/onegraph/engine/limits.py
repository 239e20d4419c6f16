"""The engine's limits in effect, and why: what was asked for, what the model has, what the memory holds.

Takes: the engine's configuration, the model's length and KV layout. Gives: `Limits`. What was asked for and
can't be had is a `ConfigError`; a default that can't is lowered, with a reason, a log line and a count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onegraph.config.engine import EngineConfig
from onegraph.counters import counters
from onegraph.engine.kv_cache import KVCachePlan, LayerKV, plan_kv_cache
from onegraph.errors import ConfigError
from onegraph.log import get_logger

log = get_logger(__name__)

DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Limits:
    """max_model_len: tokens of a prompt and its output. max_num_seqs, max_num_batched_tokens: of one step.

    compiled_model_len: what the model is compiled for, which doesn't go by the memory that is here.
    downgrades: reasons for defaults that were lowered.
    """

    max_model_len: int
    compiled_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache: KVCachePlan
    downgrades: tuple[str, ...] = ()

    @property
    def block_size(self) -> int:
        """Tokens in a KV block."""
        return self.kv_cache.block_size

    @property
    def max_blocks_per_seq(self) -> int:
        """KV blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)

    @property
    def compiled_blocks_per_seq(self) -> int:
        """KV blocks of the longest sequence that the model is compiled for."""
        return -(-self.compiled_model_len // self.block_size)


def resolve_limits(
    config: EngineConfig,
    *,
    model_len: int,
    layers: Sequence[LayerKV],
    available_bytes: Callable[[], int | None],
) -> Limits:
    """Works out the limits; `model_len` is the longest text that the model was made for.

    `available_bytes` is as for `plan_kv_cache`: the memory of the model's device.
    """
    asked_len = config.max_model_len
    if asked_len is not None and asked_len > model_len:
        raise ConfigError(
            f"max_model_len={asked_len} is more than the {model_len} positions of the model",
            where="the engine's limits",
            hint=f"give at most {model_len}, or leave it out",
        )
    max_model_len = asked_len or model_len
    kv_cache = plan_kv_cache(
        layers,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        num_kv_blocks=config.num_kv_blocks,
        available_bytes=available_bytes,
    )
    downgrades: tuple[str, ...] = ()
    if kv_cache.num_tokens < max_model_len:
        size, held = kv_cache.block_size, kv_cache.num_tokens
        room = f"{kv_cache.num_blocks} KV blocks of {size} tokens hold {held} tokens"
        if asked_len is not None:
            raise ConfigError(
                f"max_model_len={asked_len} does not fit: {room} ({kv_cache.why})",
                where="the engine's limits",
                hint=f"give max_model_len={kv_cache.num_tokens} or less, or more num_kv_blocks",
            )
        downgrades = (f"max_model_len is {kv_cache.num_tokens}, not the model's {model_len}: {room} ({kv_cache.why})",)
        max_model_len = kv_cache.num_tokens
        counters.add("downgrades")
        log.info(downgrades[0])
    return Limits(
        max_model_len=max_model_len,
        compiled_model_len=asked_len or model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS,
        kv_cache=kv_cache,
        downgrades=downgrades,
    )
