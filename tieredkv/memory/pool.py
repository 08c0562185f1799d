"""Device pool: slots of one page each."""

from __future__ import annotations

import torch

from tieredkv.memory.ledger import DeviceLedger


class DevicePool:
    """`S` slots of one page `(2, C, D)` each, zeroed at first. A slot is free or has exactly one owner.

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
        self._free = list(range(slots - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def take(self, count: int) -> torch.Tensor:
        """`count` free slots, `(count,)` int64; the caller owns them until `give_back`. MemoryError if too few."""
        if count > len(self._free):
            raise MemoryError(f"{count} slots were asked for, {len(self._free)} are free")
        slots = [self._free.pop() for _ in range(count)]
        self._taken.update(slots)
        return torch.tensor(slots, dtype=torch.int64, device=self.pages.device)

    def give_back(self, slots: torch.Tensor) -> None:
        """Return slots. ValueError, without any effect, if one of them is not taken."""
        ids = slots.flatten().tolist()
        if len(set(ids)) != len(ids) or not self._taken.issuperset(ids):
            raise ValueError(f"slots {ids} are not all taken")
        self._taken.difference_update(ids)
        self._free.extend(ids)

    def close(self) -> None:
        """Free the memory and stop counting it. The pool then has no slots."""
        self.pages = self.pages.new_empty((0, *self.pages.shape[1:]))
        self.scales = None
        self._free, self._taken = [], set()
        self.ledger.release("pool")

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot is lost, listed twice, or both free and taken."""
        free = set(self._free)
        assert len(free) == len(self._free), "a slot is free twice"
        assert not free & self._taken, "a slot is free and taken"
        assert free | self._taken == set(range(self.pages.shape[0])), "a slot is lost"
