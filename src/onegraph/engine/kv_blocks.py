"""The pool of KV blocks: reference counts, and the index of full blocks that later prompts can share.

Takes: token ids of full blocks, chained from a prompt's start. Gives: ids of blocks, which index the KV cache
tensors.
Keeps: each block free or referenced; a free block keeps its content, and can be hit, until it is the least
recently used and given out again. A content's key holds the number of the prefix before it and the tokens
themselves, so two contents are never confused: prefix numbers are used once, and no hash stands for tokens.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

ROOT_PREFIX = 0
"""The prefix number that stands before a prompt's first block."""


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The longest cached run of full blocks at a prompt's start, and its last one's prefix number."""

    blocks: tuple[int, ...] = ()
    prefix: int = ROOT_PREFIX


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reset()

    def reset(self) -> None:
        """Frees every block and forgets every content."""
        self._refs = [0] * self.num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.num_blocks))  # next to give out first
        self._content: list[tuple[int, tuple[int, ...]] | None] = [None] * self.num_blocks
        self._prefix = [ROOT_PREFIX] * self.num_blocks  # of the chain that ends in this block
        self._cached: dict[tuple[int, tuple[int, ...]], int] = {}
        self._next_prefix = ROOT_PREFIX + 1

    @property
    def num_free(self) -> int:
        """Blocks without a reference, cached content or not."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_free_among(self, blocks: Sequence[int]) -> int:
        """How many of these blocks would leave the free ones if they were retained."""
        return sum(self._refs[block] == 0 for block in blocks)

    def match(self, token_ids: Sequence[int], max_tokens: int) -> PrefixHit:
        """Finds the cached full blocks that hold the first tokens, at most `max_tokens` of them."""
        size, blocks, prefix = self.block_size, [], ROOT_PREFIX
        for start in range(0, max_tokens - size + 1, size):
            block = self._cached.get((prefix, tuple(token_ids[start : start + size])))
            if block is None:
                break
            blocks.append(block)
            prefix = self._prefix[block]
        return PrefixHit(tuple(blocks), prefix)

    def register(self, block: int, prefix: int, token_ids: Sequence[int]) -> int:
        """Makes a computed, full block findable behind `prefix`; gives the prefix number that it ends.

        When another block holds the same content already, that one stays the findable one.
        """
        content = (prefix, tuple(token_ids))
        assert len(content[1]) == self.block_size and self._refs[block] > 0 and self._content[block] is None
        found = self._cached.get(content)
        if found is not None:
            return self._prefix[found]
        self._cached[content] = block
        self._content[block] = content
        self._prefix[block] = self._next_prefix
        self._next_prefix += 1
        return self._prefix[block]

    def allocate(self, num_blocks: int) -> list[int]:
        """Gives out free blocks, those without content first, then the least recently used."""
        assert num_blocks <= len(self._free)
        blocks = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in blocks:
            content = self._content[block]
            if content is not None:
                del self._cached[content]
                self._content[block] = None
            self._refs[block] = 1
        return blocks

    def retain(self, blocks: Sequence[int]) -> None:
        """Adds a reference to each, free or not."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops a reference from each. Give a sequence's blocks in order: its tail is forgotten first."""
        for block in reversed(blocks):
            assert self._refs[block] > 0
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if self._content[block] is None:
                    self._free.move_to_end(block, last=False)
