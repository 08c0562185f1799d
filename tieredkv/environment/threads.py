"""Limits the threads that torch computes with, for the calling thread alone and for one block of code.

Threads wait for each other at the end of each operation. For small operations that costs more than a second thread
gains, and many times more when another process occupies one of the cores.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

NUMBERS_PER_THREAD = 2**23
"""Numbers a layer's decoding step must read per thread for another thread to pay off (docs/log.md)."""


def worth(numbers: int) -> int:
    """How many threads pay off for reading `numbers` numbers; at least one."""
    return max(1, numbers // NUMBERS_PER_THREAD)


_PROCESS_DEFAULT = 0
"""MKL's value for the process-wide number of threads."""


def limit(threads: int, mkl: int | None = None) -> bool:
    """Set the number of threads for the calling thread's operations. mkl: a different number for MKL.

    Returns False, without any effect, if torch was not built with OpenMP and MKL, or not on Linux.
    (`torch.set_num_threads` would change MKL's number for the whole process, and for threads started meanwhile.)
    """
    setters = _setters()
    if setters is None:
        return False
    set_openmp, set_mkl = setters
    set_openmp(threads)
    set_mkl(threads if mkl is None else mkl)
    return True


@contextmanager
def at_most(threads: int) -> Iterator[None]:
    """Inside the block, limit this thread's CPU operations in torch to `threads` threads."""
    before = torch.get_num_threads()
    if threads >= before or not limit(threads):
        yield
        return
    try:
        yield
    finally:
        limit(before, mkl=_PROCESS_DEFAULT)


@cache
def _setters() -> tuple[Callable[[int], int], Callable[[int], int]] | None:
    """OpenMP's and MKL's functions that set the calling thread's number of threads; None if they are not found."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return library.omp_set_num_threads, library.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None
