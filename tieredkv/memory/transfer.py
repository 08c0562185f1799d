"""Copies between the tiers, counted.

The only file that moves keys and values between host and device. On a CPU-only machine both ends are RAM and a
transfer is an indexed copy.
"""

from __future__ import annotations

import torch


class Transfer:
    """Host/device copies and their byte counts. One per cache. `stage` may run on another thread."""

    def __init__(self) -> None:
        self.streamed_bytes = 0
        """Past keys and values streamed to the device during prefill."""

    def stage(self, chunks: torch.Tensor, staged: torch.Tensor, with_values: bool) -> int:
        """Copy consecutive host chunks `(K, n, 2, C, D)` into a device buffer of the same shape; bytes moved.

        Of what is on the host, the keys alone suffice without `with_values`; a card is faster given both, which lie
        side by side: one contiguous copy per head.
        """
        if staged.device.type == "cpu":
            part = slice(0, 2 if with_values else 1)
            staged[:, :, part].copy_(chunks[:, :, part])
            return staged[:, :, part].numel() * staged.itemsize
        for to, of in zip(staged, chunks, strict=True):
            to.copy_(of, non_blocking=True)
        return staged.nbytes

    def reset(self) -> None:
        """Start the counts again."""
        self.streamed_bytes = 0
