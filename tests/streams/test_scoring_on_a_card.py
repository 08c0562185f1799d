"""Scoring a question's rows on a card: what they attend to comes to the host once a layer, not once a block."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pretend_card import CARD, PretendCard

from tieredkv.cache.prefill import score_text_rows
from tieredkv.config import TierConfig

BLOCK = 32


class Blocks:
    """The past of a layer, all of it on the card."""

    block_tokens = BLOCK

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys, self.tokens = keys, keys.shape[1]

    def blocks(self, with_values: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        assert not with_values
        for start in range(0, self.tokens, BLOCK):
            part = self.keys[:, start : start + BLOCK]
            yield part, part


@pytest.mark.parametrize(("policy", "copies"), [("hybridkv", 1), ("paper", 2)])
def test_longer_pasts_take_no_more_copies_to_the_host(policy, copies):
    for past in (40, 400):
        query, keys = torch.randn(4, 20, 16), torch.randn(2, past + 20, 16)
        tiers = TierConfig(policy=policy)
        lse = (query.unflatten(0, (2, 2)) @ keys.unsqueeze(1).mT).flatten(0, 1).logsumexp(-1)  # rows see all here
        want = score_text_rows(query, lse, keys[:, past:], 1.0, Blocks(keys[:, :past]), tiers, None)
        with PretendCard() as card:
            here = [part.to(CARD, non_blocking=True) for part in (query, lse, keys[:, past:], keys[:, :past])]
            got = score_text_rows(*here[:3], 1.0, Blocks(here[3]), tiers, None)
        assert card.waits == ["copy to the host"] * copies
        assert torch.equal(got.halves, want.halves)
        assert (got.scores is None) == (policy == "hybridkv")
