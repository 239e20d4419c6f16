"""The KV cache tensors, sized from the memory that is there.

Takes: a model's KV layout and the engine's limits. Gives: how many blocks there are, with the reason in
words, and the tensors: for each layer keys and values [num_blocks, block_size, KV heads, head size].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onegraph.errors import ConfigError

KVCaches = list[tuple[Tensor, Tensor]]

KV_MEMORY_FRACTION = 0.5
"""Of the available memory; the rest is left to activations, logits and the compiler."""


@dataclass(frozen=True, slots=True)
class LayerKV:
    """What one layer stores for a token, in keys and again in values: heads, their size, and the dtype."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes of keys and values together."""
        return 2 * num_tokens * self.num_kv_heads * self.head_dim * int(self.dtype.itemsize)


@dataclass(frozen=True, slots=True)
class KVCachePlan:
    """How many blocks there are and why; `block_bytes` is one block over all layers."""

    num_blocks: int
    block_size: int
    block_bytes: int
    why: str

    @property
    def num_tokens(self) -> int:
        """Tokens that fit."""
        return self.num_blocks * self.block_size

    def __str__(self) -> str:
        size_mib = self.num_blocks * self.block_bytes / 2**20
        return (
            f"{self.num_blocks} blocks of {self.block_size} tokens = {self.num_tokens} tokens, "
            f"{size_mib:.0f} MiB ({self.why})"
        )


def plan_kv_cache(
    layers: Sequence[LayerKV],
    *,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int,
    num_kv_blocks: int | None,
    available_bytes: Callable[[], int | None],
) -> KVCachePlan:
    """Sizes the cache: what was asked for, else what all sequences can use, within a fraction of the memory.

    `available_bytes` gives None where the memory can't be known. Errors: `ConfigError` when it isn't and nothing was
    asked for, when not even one block fits, or when what was asked for is more than there is.
    """
    block_bytes = sum(layer.num_bytes(block_size) for layer in layers)
    available = available_bytes()
    if num_kv_blocks is not None:
        if available is not None and num_kv_blocks * block_bytes > available:
            raise ConfigError(
                f"num_kv_blocks={num_kv_blocks} needs {num_kv_blocks * block_bytes / 2**20:.0f} MiB, "
                f"but {available / 2**20:.0f} MiB of memory are available",
                where="the KV cache",
                hint=f"give at most num_kv_blocks={available // block_bytes}, or leave it out",
            )
        return KVCachePlan(num_kv_blocks, block_size, block_bytes, "as asked by num_kv_blocks")
    if available is None:
        raise ConfigError(
            "the available memory can't be read on this machine",
            where="sizing the KV cache",
            hint="set num_kv_blocks",
        )
    wanted = max_num_seqs * -(-max_model_len // block_size)
    fitting = int(available * KV_MEMORY_FRACTION) // block_bytes
    if fitting < 1:
        raise ConfigError(
            f"no KV block fits: one of {block_size} tokens needs {block_bytes / 2**20:.1f} MiB, and "
            f"{KV_MEMORY_FRACTION:.0%} of the {available / 2**20:.1f} MiB that are available is less",
            where="the KV cache",
            hint="free memory, use a smaller block_size or model, or set num_kv_blocks",
        )
    if wanted <= fitting:
        return KVCachePlan(
            wanted,
            block_size,
            block_bytes,
            f"all that {max_num_seqs} sequences of {max_model_len} tokens can use",
        )
    why = f"{KV_MEMORY_FRACTION:.0%} of {available / 2**30:.1f} GiB available memory"
    return KVCachePlan(fitting, block_size, block_bytes, why)


def allocate_kv_caches(
    layers: Sequence[LayerKV], plan: KVCachePlan, zeros: Callable[[tuple[int, ...], torch.dtype], Tensor]
) -> KVCaches:
    """The tensors, zero, as inference tensors: they are written in inference mode only.

    `zeros` is the device's way to make a tensor with a storage of its own (see `ir.target`).
    """
    with torch.inference_mode():
        return [(_allocate(layer, plan, zeros), _allocate(layer, plan, zeros)) for layer in layers]


def _allocate(layer: LayerKV, plan: KVCachePlan, zeros: Callable[[tuple[int, ...], torch.dtype], Tensor]) -> Tensor:
    num_blocks = max(plan.num_blocks, 2)  # the least size of a dim that one graph is for, see FlatModel
    try:
        return zeros((num_blocks, plan.block_size, layer.num_kv_heads, layer.head_dim), layer.dtype)
    except MemoryError as error:
        raise ConfigError(
            f"no memory for the KV cache, {plan}: {error}",
            where="the KV cache",
            hint=f"give fewer num_kv_blocks than {plan.num_blocks}",
        ) from error
