"""Device pool: slots of one page each."""

from __future__ import annotations

import torch

from tieredkv.memory.ledger import DeviceLedger


class DevicePool:
    """`S` slots of one page `(2, C, D)` each, zeroed at first. Slots are handed out once, in order.

    packed: pages are int8 with `scales` `(S, 2, C)` (`ops.packing`); otherwise `scales` is None.
    """

    def __init__(
        self,
        ledger: DeviceLedger,
        slots: int,
        chunk_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        packed: bool = False,
    ) -> None:
        self.ledger = ledger
        shape = (slots, 2, chunk_tokens, head_dim)
        self.pages = ledger.empty("pool", shape, torch.int8 if packed else dtype, device).zero_()
        self.scales = ledger.empty("pool", shape[:3], torch.float16, device).zero_() if packed else None
        self._taken = 0

    def take(self, count: int) -> torch.Tensor:
        """`count` slots that nobody has, `(count,)` int64. MemoryError if there are fewer."""
        if count > (free := len(self.pages) - self._taken):
            raise MemoryError(f"{count} slots were requested, {free} are free")
        first, self._taken = self._taken, self._taken + count
        return torch.arange(first, self._taken, dtype=torch.int64, device=self.pages.device)

    def close(self) -> None:
        """Free the memory and stop counting it. The pool then has no slots."""
        self.pages = self.pages.new_empty((0, *self.pages.shape[1:]))
        self.scales = None
        self._taken = 0
        self.ledger.release("pool")
