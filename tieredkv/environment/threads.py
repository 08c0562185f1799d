"""How many threads torch computes with, for the calling thread alone and for a while.

Threads wait for each other at the end of each operation. Where operations are small that costs more than a second
thread brings, and many times more where another process has taken the core that one of them needs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

NUMBERS_PER_THREAD = 2**23
"""Numbers that a decoding step of one layer reads before a second thread is worth waiting for (docs/log.md)."""


def worth(numbers: int) -> int:
    """Threads that reading so many numbers is worth: at least one."""
    return max(1, numbers // NUMBERS_PER_THREAD)


_OF_THE_PROCESS = 0
"""What MKL takes for "as many as the process has"."""


def limit(threads: int, mkl: int | None = None) -> bool:
    """Let this thread's operations use `threads` threads from here on. mkl: MKL's, if not as many.

    False, and nothing happens, where torch was built with other libraries than OpenMP and MKL, or on another system
    than Linux. (`torch.set_num_threads` would change MKL's threads for the whole process, and all threads that begin
    meanwhile.)
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
    """Let torch's operations on the CPU use at most `threads` threads where this thread calls them inside the block."""
    before = torch.get_num_threads()
    if threads >= before or not limit(threads):
        yield
        return
    try:
        yield
    finally:
        limit(before, mkl=_OF_THE_PROCESS)


@cache
def _setters() -> tuple[Callable[[int], int], Callable[[int], int]] | None:
    """OpenMP's and MKL's functions that set the calling thread's number of threads; None where they are not found."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return library.omp_set_num_threads, library.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return None
