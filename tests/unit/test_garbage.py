"""The collector is off inside, and afterwards as it was, also after an error."""

import gc

import pytest

from onegraph.garbage import collected_later


def test_it_is_off_inside_and_as_before_afterwards() -> None:
    assert gc.isenabled()
    with collected_later():
        with collected_later():
            assert not gc.isenabled()
        assert not gc.isenabled()
    with pytest.raises(ZeroDivisionError), collected_later():
        raise ZeroDivisionError
    assert gc.isenabled()
