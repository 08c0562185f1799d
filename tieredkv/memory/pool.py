"""Device pool: slots of one page each."""

from __future__ import annotations

import torch

from tieredkv.codecs.base import Codec
from tieredkv.memory.ledger import DeviceLedger


class DevicePool:
    """`records`, `(S, B)` uint8: `S` slots of one page, zeroed at first. Slots are handed out once, in order."""

    def __init__(self, ledger: DeviceLedger, slots: int, codec: Codec, device: torch.device) -> None:
        """codec: of the pages; B is its `chunk_bytes`."""
        self.ledger, self.codec = ledger, codec
        self.records = ledger.empty("pool", (slots, codec.chunk_bytes), torch.uint8, device).zero_()
        self._taken = 0

    def take(self, count: int) -> range:
        """`count` slots that nobody has. MemoryError if there are fewer."""
        if count > (free := len(self.records) - self._taken):
            raise MemoryError(f"{count} slots were requested, {free} are free")
        first, self._taken = self._taken, self._taken + count
        return range(first, self._taken)

    def close(self) -> None:
        """Free the memory and stop counting it. The pool then has no slots."""
        self.records = self.records.new_empty((0, self.codec.chunk_bytes))
        self._taken = 0
        self.ledger.release("pool")
