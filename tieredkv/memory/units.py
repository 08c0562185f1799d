"""Units of size, the sizes that caps may have, and the arithmetic of fitting things into a size."""

from __future__ import annotations

import math
from collections.abc import Callable

from tieredkv.errors import BudgetError, check_value, is_number

GIB = 2**30
FLOAT16 = 2
FLOAT32 = INT32 = 4
INT64 = 8
"""Bytes of a number."""


def check_gpu_kv_gb(value: object) -> None:
    """Raise `BudgetError` unless this is a size that a cap on device memory can have."""
    size = "a number of GiB above 0 (fractions are allowed) and at most 2**20"
    check_value(is_number(value) and 0 < value <= 2**20, "gpu_kv_gb", value, size, BudgetError)


def check_host_kv_gb(value: object) -> None:
    """Raise `BudgetError` unless this is None or a size that a cap on host memory can have."""
    ok = value is None or (is_number(value) and value > 0)
    check_value(ok, "host_kv_gb", value, "None or a number above 0", BudgetError)


HOST_BITS = (16, 8, 4)
"""Keys of `codecs.CODECS`, here so that a command can check an option without torch."""


def check_host_kv_bits(value: object) -> None:
    """Raise `OptionError` unless this is None or the bits of a codec."""
    ok = value is None or (value in HOST_BITS and isinstance(value, int) and not isinstance(value, bool))
    check_value(ok, "host_kv_bits", value, f"None or one of {', '.join(map(str, HOST_BITS))}")


def check_step_overhead(value: object) -> None:
    """Raise `OptionError` unless this is None or what a step may wait for copies, as a share of the
    model's own time."""
    ok = value is None or value == math.inf or (is_number(value) and value >= 0)
    check_value(ok, "step_overhead", value, "None, or a number of at least 0, which may be infinity")


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


def size_text(nbytes: int, digits: int = 3) -> str:
    """Bytes in the largest binary unit that leaves at least one, in `digits` digits."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= size:
            value = nbytes / size
            return f"{value:.{max(digits, len(str(int(value))))}g} {unit}"
    return f"{nbytes} B"


def different_sizes(one: int, other: int) -> tuple[str, str]:
    """Two sizes that differ as texts that differ, in at least three digits."""
    texts = ("", "")
    for digits in range(3, 17):
        texts = size_text(one, digits), size_text(other, digits)
        if texts[0] != texts[1]:
            break
    return texts


def _exponent(value: float) -> int:
    return int(f"{value:e}".rpartition("e")[2])
