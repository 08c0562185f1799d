"""Bytes as GiB, and the search for the largest that fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tieredkv.memory.units import GIB, as_gib, largest


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_the_largest_that_fits_is_found_whatever_the_limit(limit, most):
    assert largest(lambda number: number <= limit, most) == min(limit, most)


@given(st.integers(1, 2**45))
def test_gib_text_read_back_is_enough_and_hardly_more(nbytes):
    back = int(float(as_gib(nbytes)) * GIB)
    assert nbytes <= back <= nbytes * 1.011 + 1
