"""Bytes as GiB, and the search for the largest that fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tieredkv.memory.units import GIB, as_gib, different_sizes, largest, size_text


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_the_largest_that_fits_is_found_whatever_the_limit(limit, most):
    assert largest(lambda number: number <= limit, most) == min(limit, most)


@given(st.integers(1, 2**45))
def test_gib_text_read_back_is_enough_and_hardly_more(nbytes):
    back = int(float(as_gib(nbytes)) * GIB)
    assert nbytes <= back <= nbytes * 1.011 + 1


def test_a_size_is_written_in_the_unit_that_fits_it():
    sizes = (0, 1023, 1024, 1536 * 1024, 2**30 - 1, 15 * 2**30, 2000 * 2**30)
    assert [size_text(size) for size in sizes] == [
        *("0 B", "1023 B", "1 KiB", "1.5 MiB", "1024 MiB", "15 GiB", "2000 GiB")
    ]


@given(st.integers(0, 2**45), st.integers(0, 2**45))
def test_two_sizes_that_differ_are_written_differently(one, other):
    assert (len(set(different_sizes(one, other))) == 1) == (one == other)
