"""Units of size, and the arithmetic of fitting things into a size."""

from __future__ import annotations

from collections.abc import Callable

GIB = 2**30
FLOAT16 = 2
FLOAT32 = INT32 = 4
INT64 = 8
"""Bytes of a number."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest whole number from 1 to `most` that fits; 0 if none does. `fits` must be monotonic."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def as_gib(nbytes: int) -> str:
    """Bytes as GiB in few digits, rounded up, so that the printed number is enough as `gpu_kv_gb`."""
    value = nbytes / GIB
    for digits in range(3, 18):
        text = f"{value:.{digits}g}"
        if int(float(text) * GIB) >= nbytes:
            return text
        step = 10.0 ** (_exponent(value) - digits + 1)
        text = f"{value + step:.{digits}g}"
        if int(float(text) * GIB) >= nbytes:
            return text
    return repr(value * (1 + 1e-12))


def _exponent(value: float) -> int:
    return int(f"{value:e}".rpartition("e")[2])
