"""All tests here need a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """Skips where there is none; inference only, as everywhere in onegraph."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    torch.manual_seed(0)
    with torch.no_grad():
        yield
