"""What stands behind the rows of a call, in tensors and in arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onegraph.config.compilation import CUDAGraphMode
from onegraph.cudagraph.padding import fill_padding, fits
from onegraph.cudagraph.sizes import Decision
from onegraph.engine.recorded_batches import PADDING, RecordedBatches
from onegraph.ir.padding import PaddedSizes, padded_sizes

ROWS = [[1, 2, 9], [3, 4, 9], [9, 9, 9]]


@pytest.mark.parametrize("made_by", [torch.tensor, np.array])
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("keep", ROWS),
        ("zero", [[1, 2, 0], [3, 4, 0], [0, 0, 0]]),
        ("last", [[1, 2, 2], [3, 4, 4], [3, 4, 4]]),
        (-1, [[1, 2, -1], [3, 4, -1], [-1, -1, -1]]),
    ],
)
def test_policies(policy: Any, expected: list[list[int]], made_by: Any) -> None:
    whole = made_by(ROWS)
    fill_padding(whole, {0: 2, 1: 2}, policy)
    assert whole.tolist() == expected
    fill_padding(whole, {0: 3, 1: 3}, policy)
    assert whole.tolist() == expected


def test_numbers_that_a_dtype_has() -> None:
    assert fits(-1, torch.int64) and fits(127, torch.int8) and fits(1, torch.bool) and fits(2048, torch.float16)
    assert fits(10**9, torch.float64) and fits(-1, torch.bfloat16)
    assert not fits(-1, torch.uint8) and not fits(128, torch.int8) and not fits(2, torch.bool)
    assert not fits(10**9, torch.float16) and not fits(257, torch.bfloat16) and not fits(10**400, torch.float32)
    assert fits("last", torch.uint8)


def test_the_share_of_padding() -> None:
    gaps = list(padded_sizes([4, 1, 8], 1, CUDAGraphMode.FULL))
    assert gaps == [PaddedSizes(2, 3, 4, CUDAGraphMode.FULL), PaddedSizes(5, 7, 8, CUDAGraphMode.FULL)]
    assert [one.share for one in gaps] == [(2 + 1) / 8, (3 + 2 + 1) / 24]
    assert list(padded_sizes([4], None, CUDAGraphMode.FULL)) == []
    assert [(one.first, one.last) for one in padded_sizes([4], 0, CUDAGraphMode.FULL)] == [(0, 3)]


def test_a_batch_is_padded_as_the_table_says() -> None:
    batches = RecordedBatches(CUDAGraphMode.FULL_DECODE_ONLY, (4,), (), max_num_seqs=4, max_blocks_per_seq=3)
    arrays = {
        "input_ids": np.array([7, 8]),
        "positions": np.array([3, 20]),
        "slot_mapping": np.array([19, 36]),
        "query_start_loc": np.array([0, 1, 2]),
        "seq_lens": np.array([4, 21]),
        "block_tables": np.array([[1, 0], [0, 2]], dtype=np.int32),
        "logits_indices": np.array([0, 1]),
    }
    found = batches.padded(arrays, Decision(CUDAGraphMode.FULL, 4, "padded"))
    assert {name: found[name].tolist() for name in PADDING} == {
        "input_ids": [7, 8, 0, 0],
        "positions": [3, 20, 0, 0],
        "slot_mapping": [19, 36, -1, -1],
        "query_start_loc": [0, 1, 2, 2, 2],
        "seq_lens": [4, 21, 0, 0],
        "block_tables": [[1, 0, 0], [0, 2, 0], [0, 0, 0], [0, 0, 0]],
        "logits_indices": [0, 1, 0, 0],
    }
    assert all(found[name].dtype == array.dtype for name, array in arrays.items())
    in_pieces = batches.padded(arrays, Decision(CUDAGraphMode.PIECEWISE, 4, "padded"))
    assert len(in_pieces["slot_mapping"]) == 4 and in_pieces["query_start_loc"] is arrays["query_start_loc"]
