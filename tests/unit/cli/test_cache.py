"""Sizes and ages as people write them."""

from __future__ import annotations

import pytest

from onegraph.cli.cache import _age, _size
from onegraph.cli.flags import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("500", 500), ("2K", 2048), ("1.5m", 1572864), ("2G", 2**31), ("1GiB", 2**30), ("1TB", 2**40)],
)
def test_sizes(text: str, size: int) -> None:
    assert _size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("2m", 120), ("12h", 43200), ("30d", 2592000), ("1w", 604800)]
)
def test_ages(text: str, seconds: float) -> None:
    assert _age(text) == seconds


@pytest.mark.parametrize("text", ["", "-1G", "2X", "G", "1 2"])
def test_what_is_no_size_or_age(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        _size(text)
    with pytest.raises(UsageError, match="is no age"):
        _age(text)
