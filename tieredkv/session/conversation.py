"""A conversation: its turns, and cached tokens of its last prompt, which the next turn does not read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tieredkv.cache.passage import Passage
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.errors import BudgetError
from tieredkv.memory.limits import check_host


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A passage that begins at the end of the video, and the token ids `(n,)` that were read in it."""

    ids: torch.Tensor
    passage: Passage


class Conversation:
    """Questions and answers, and what is kept of the last prompt.

    The last answer is not kept: it was decoded under the budget, and is read exactly, once, with the next question.
    """

    def __init__(self, turns: Sequence[tuple[str, str]] = ()) -> None:
        self.turns = list(turns)
        self.kept: Kept | None = None
        """None: the next turn reads all turns again."""

    @property
    def nbytes(self) -> int:
        """Host memory of what is kept."""
        return 0 if self.kept is None else self.kept.passage.nbytes

    def add(self, question: str, answer: str, kept: Kept | None) -> None:
        """A turn is complete. kept: of its prompt."""
        self.turns.append((question, answer))
        self.kept = kept

    def passage(self, ids: torch.Tensor, most: int) -> Passage | None:
        """What is kept of a prompt whose tokens after the video are `ids` `(n,)`; of its first `most` tokens only."""
        if self.kept is None:
            return None
        known = self.kept.ids
        n = min(len(known), len(ids))
        same = int((known[:n] == ids[:n]).long().cumprod(0).sum())
        return self.kept.passage.first(min(same, most))

    def keep(self, cache: TieredCache, ids: torch.Tensor) -> Kept | None:
        """A copy of the cache's last tokens, which are `ids` `(n,)`; None where host memory has no room for it."""
        begin = cache.get_seq_length() - len(ids)
        held = cache.host_bytes + self.nbytes
        try:
            needed = held + Passage.nbytes_of(cache, begin)
            check_host(needed, cache.tiers.host_kv_gb, "the conversation", "clear_history()", allocated_bytes=held)
        except BudgetError:
            return None
        return Kept(ids, Passage.of(cache, begin))
