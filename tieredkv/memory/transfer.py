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

    def stage(self, chunks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None) -> int:
        """Copy consecutive host chunks `(K, n, 2, C, D)` into contiguous device buffers `(K, n * C, D)`; bytes moved.

        values None copies the keys alone.
        """
        k, n, _, c, d = chunks.shape
        keys.view(k, n, c, d).copy_(chunks[:, :, 0])
        moved = keys.numel() * keys.itemsize
        if values is not None:
            values.view(k, n, c, d).copy_(chunks[:, :, 1])
            moved += values.numel() * values.itemsize
        return moved

    def reset(self) -> None:
        """Start the counts again."""
        self.streamed_bytes = 0
