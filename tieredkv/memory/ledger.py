"""DeviceLedger: every device byte held for keys and values is allocated here and counted against the cap."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from tieredkv.errors import BudgetError


class DeviceLedger:
    """Counts and bounds the device memory of one cache.

    On a machine without an accelerator the "device" is the same RAM as the host; the ledger counts it all the same.
    """

    def __init__(self, cap_bytes: int) -> None:
        self.cap_bytes = cap_bytes
        self.peak_bytes = 0
        self._held: dict[str, int] = {}

    @property
    def used_bytes(self) -> int:
        return sum(self._held.values())

    @property
    def free_bytes(self) -> int:
        return self.cap_bytes - self.used_bytes

    def held(self) -> dict[str, int]:
        """Bytes held now, by purpose."""
        return dict(self._held)

    def reserve(self, purpose: str, nbytes: int) -> None:
        """Count `nbytes` for `purpose` (added to what it holds). Raises `BudgetError` instead of passing the cap."""
        if nbytes > self.free_bytes:
            raise BudgetError(
                f"{nbytes:,} bytes for {purpose} would pass the device cap: {self.used_bytes:,} of "
                f"{self.cap_bytes:,} bytes are in use. Raise gpu_kv_gb."
            )
        self._held[purpose] = self._held.get(purpose, 0) + nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def release(self, purpose: str) -> None:
        """Stop counting everything held for `purpose`; nothing happens if there is none."""
        self._held.pop(purpose, None)

    def empty(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised device tensor, counted under `purpose`. Its owner drops it and calls `release`."""
        nbytes = math.prod(shape) * dtype.itemsize
        self.reserve(purpose, nbytes)
        try:
            return torch.empty(shape, dtype=dtype, device=device)
        except BaseException:
            self._held[purpose] -= nbytes
            raise

    @contextmanager
    def scratch(self, purpose: str, nbytes: int) -> Iterator[None]:
        """Count memory that lives only inside the block."""
        before = self._held.get(purpose, 0)
        self.reserve(purpose, nbytes)
        try:
            yield
        finally:
            if before:
                self._held[purpose] = before
            else:
                self.release(purpose)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """For a block that gives work to a device: kernels and streams are those of the current card."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
