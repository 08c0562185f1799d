"""How functions are compiled, and the functions of mathematics that compiled loops use.

A loop is fast only if the compiler turns it into vector instructions. It does so with an innermost loop over whole
arrays, each a parameter of the function or a row taken before the loop; and without calls to the C library, which
take one number at a time. Hence the small functions, and `exp` and `log`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numba import njit

FAST = {"contract", "reassoc", "nsz", "arcp"}
"""Rounding may differ from that of the order written; NaN and infinity are kept."""
LOG2E, LN2_HIGH, LN2_LOW = (np.float32(value) for value in (1.44269504088896341, 0.693359375, -2.12194440e-4))
LOWEST = np.float32(-87.0)
"""The exponential of anything lower is that of this, 1.6e-38."""


def compiled(
    function: Callable[..., Any] | None = None, signatures: list[str] | None = None, as_written: bool = False
) -> Any:
    """`function`, compiled for each of `signatures` where it is defined; without any, for the types that compiled
    functions call it with. The result is kept on disk for later processes, where a folder can be written, until the
    function's file changes: `touch` it after a change to what it calls in another file. as_written: rounding is
    that of the order written."""
    if function is None:
        return partial(compiled, signatures=signatures, as_written=as_written)
    options: dict[str, Any] = {"nogil": True, "fastmath": False if as_written else FAST, "error_model": "numpy"}
    try:
        return njit(signatures, cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(signatures, **options)(function)


@njit(fastmath=FAST, inline="always")
def exp(x: Any) -> Any:
    """To within 3e-7 of the result (Cephes' expf)."""
    x = LOWEST if x < LOWEST else x  # in this order, as NaN must stay NaN
    n = np.floor(x * LOG2E + np.float32(0.5))
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(fastmath=FAST, inline="always")
def log(x: Any) -> Any:
    """Of a normal number, to within 2e-7 of the result (Cephes' logf)."""
    bits = np.float32(x).view(np.int32)
    # x is m * 2**n with m from sqrt(1/2) to sqrt(2).
    n = np.int32((bits - np.int32(0x3F3504F3)) >> np.int32(23))
    m = np.int32(bits - np.int32(n << np.int32(23))).view(np.float32) - np.float32(1.0)
    p = np.float32(7.0376836292e-2)
    p = p * m - np.float32(1.1514610310e-1)
    p = p * m + np.float32(1.1676998740e-1)
    p = p * m - np.float32(1.2420140846e-1)
    p = p * m + np.float32(1.4249322787e-1)
    p = p * m - np.float32(1.6668057665e-1)
    p = p * m + np.float32(2.0000714765e-1)
    p = p * m - np.float32(2.4999993993e-1)
    p = p * m + np.float32(3.3333331174e-1)
    square, e = m * m, np.float32(n)
    return m + (m * square * p + e * LN2_LOW - np.float32(0.5) * square) + e * LN2_HIGH


@njit(inline="always")
def from_half(bits: Any) -> Any:
    """The float16 that `bits` are, as float32; infinity is NaN."""
    small = np.int32((np.int32(bits) & 0x7FFF) << 13).view(np.float32) * np.float32(2.0**112)
    size = np.float32(np.nan) if bits & 0x7C00 == 0x7C00 else small
    return -size if bits & 0x8000 else size


@njit(inline="always")
def to_half(x: Any) -> Any:
    """The bits of the float16 nearest to a float32 that is not negative."""
    if not x < np.float32(65520):
        return np.int16(0x7C00 if x == x else 0x7E00)
    if x < np.float32(2.0**-14):
        return np.int16(np.rint(x * np.float32(2.0**24)))
    bits = np.int64(np.float32(x).view(np.int32))
    return np.int16(((bits + 0xFFF + (bits >> 13 & 1)) >> 13) - (112 << 10))
