"""The block tables of the running sequences: one row each, which the runner gathers from in one operation.

Takes: block ids as the scheduler gives them out. Keeps: a host array, so that a step writes only what is new.
`R` rows (at most max_num_seqs), `B` blocks of the longest sequence.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class BlockTables:
    """int32 [max_num_seqs, max_blocks_per_seq]; entries past a sequence's blocks have no meaning."""

    def __init__(self, max_num_seqs: int, max_blocks_per_seq: int) -> None:
        self.array: npt.NDArray[np.int32] = np.zeros((max_num_seqs, max_blocks_per_seq), dtype=np.int32)
        self.reset()

    def reset(self) -> None:
        """Frees all rows."""
        self._free = list(range(len(self.array)))[::-1]

    @property
    def num_free_rows(self) -> int:
        """Sequences that can still be admitted."""
        return len(self._free)

    def take_row(self) -> int:
        """A free row."""
        return self._free.pop()

    def give_back_row(self, row: int) -> None:
        """Frees a row."""
        assert 0 <= row < len(self.array) and row not in self._free
        self._free.append(row)

    def write(self, row: int, start: int, blocks: Sequence[int]) -> None:
        """Writes block ids into a row from its entry `start` on."""
        self.array[row, start : start + len(blocks)] = blocks
