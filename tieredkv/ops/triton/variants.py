"""How few variants of a kernel there are.

Triton compiles a kernel once for every set of constants, and by default again where an integer argument is 1 or a
multiple of 16, or a pointer is not aligned. Integers that differ between layers, questions or lengths are therefore
named in each kernel's `do_not_specialize`; what loads must know to be wide (bytes of a record, numbers of a head) are
constants of the model. Blocks that depend on lengths have few sizes.
"""

from __future__ import annotations

from typing import Any

import torch


def bounded(count: int, least: int, most: int = 2**30) -> int:
    """A block for `count` numbers: `least` times a power of four, at most `most`."""
    block = least
    while block < min(count, most):
        block *= 4
    return min(block, most)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel; if its tensors are on the meta device, which the first argument tells, compile it and load it on
    the current card instead."""
    if args[0].device.type != "meta":
        kernel[grid](*args, **options)
        return
    compiled = kernel.run(*args, grid=grid, warmup=True, **options)
    if torch.cuda.is_available():
        compiled._init_handles()
