"""Copies between the tiers, counted.

The only file that moves keys and values between host and device. On a CPU-only machine both ends are RAM and a
transfer is an indexed copy.
"""

from __future__ import annotations

import torch


class Transfer:
    """Host/device copies and their byte counts. One per cache. `gather` and `stage` may run on another thread."""

    def __init__(self) -> None:
        self.streamed_bytes = 0
        """Past keys and values streamed to the device during prefill."""

    def gather(
        self,
        chunks: torch.Tensor,
        heads: torch.Tensor,
        ids: torch.Tensor,
        pages: torch.Tensor,
        slots: torch.Tensor,
    ) -> int:
        """Copy host chunks into pool slots; returns the bytes moved.

        chunks: `(K, n, 2, C, D)` on the host. heads, ids, slots: `(m,)`: page `slots[i]` becomes chunk `ids[i]` of
        head `heads[i]`. pages: `(S, 2, C, D)` on the device. Zero pieces is nothing done.
        """
        if ids.numel() == 0:
            return 0
        pages[slots] = chunks[heads, ids].to(pages.device)
        return ids.numel() * pages[0].numel() * pages.itemsize

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
