"""DeviceLedger: counts every device byte used for keys and values against the cap."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from tieredkv.errors import BudgetError


class DeviceLedger:
    """Counts and bounds the device memory of one cache.

    Without an accelerator the "device" is the host's RAM; it is counted in the same way.
    """

    def __init__(self, cap_bytes: int) -> None:
        self.cap_bytes = cap_bytes
        self.peak_bytes = 0
        self._bytes: dict[str, int] = {}

    @property
    def used_bytes(self) -> int:
        return sum(self._bytes.values())

    @property
    def free_bytes(self) -> int:
        return self.cap_bytes - self.used_bytes

    def set_cap(self, cap_bytes: int) -> None:
        """Bound what is reserved from now on by `cap_bytes`."""
        self.cap_bytes = cap_bytes

    def by_purpose(self) -> dict[str, int]:
        """Bytes in use, by purpose."""
        return dict(self._bytes)

    def reserve(self, purpose: str, nbytes: int) -> None:
        """Count `nbytes` more for `purpose`. Raises `BudgetError` instead of exceeding the cap."""
        if nbytes > self.free_bytes:
            raise BudgetError(
                f"{nbytes:,} bytes for {purpose} would exceed the device cap: {self.used_bytes:,} of "
                f"{self.cap_bytes:,} bytes are in use. Raise gpu_kv_gb."
            )
        self._bytes[purpose] = self._bytes.get(purpose, 0) + nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def release(self, purpose: str) -> None:
        """Stop counting everything for `purpose`, if there is any."""
        self._bytes.pop(purpose, None)

    def empty(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised device tensor, counted under `purpose` until its owner drops it and calls `release`."""
        nbytes = math.prod(shape) * dtype.itemsize
        self.reserve(purpose, nbytes)
        try:
            return torch.empty(shape, dtype=dtype, device=device)
        except BaseException:
            self._bytes[purpose] -= nbytes
            raise

    @contextmanager
    def scratch(self, purpose: str, nbytes: int) -> Iterator[None]:
        """Count memory that is used only inside the block."""
        before = self._bytes.get(purpose, 0)
        try:  # an interrupt may arrive as soon as it is counted
            self.reserve(purpose, nbytes)
            yield
        finally:
            if before:
                self._bytes[purpose] = before
            else:
                self.release(purpose)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a card current inside the block, as kernels and streams need; does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
