"""Counters count in all threads, and `expect` can fail."""

from __future__ import annotations

import threading

import pytest

from onegraph.counters import Counters


def test_expect_passes_on_what_grows_inside() -> None:
    counts = Counters()
    counts.add("gxx_runs", 5)
    with counts.expect(gxx_runs=2, store_hits=0):
        counts.add("gxx_runs")
        counts.add("gxx_runs")
    assert counts.snapshot() == {"gxx_runs": 7}


@pytest.mark.parametrize("grown", [0, 2])
def test_expect_fails_with_both_numbers(grown: int) -> None:
    counts = Counters()
    told = rf"expected \{{'gxx_runs': 1\}}, counted \{{'gxx_runs': {grown}\}}"
    with pytest.raises(AssertionError, match=told), counts.expect(gxx_runs=1):
        counts.add("gxx_runs", grown)


def test_an_error_inside_expect_is_not_hidden() -> None:
    counts = Counters()
    with pytest.raises(ZeroDivisionError), counts.expect(gxx_runs=1):
        _ = 1 // 0


def test_no_count_is_lost_between_threads() -> None:
    counts = Counters()
    threads = [threading.Thread(target=lambda: [counts.add("n") for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts.snapshot() == {"n": 4000}
