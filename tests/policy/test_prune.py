"""Which tokens a static head keeps, by the rules that presets share."""

from __future__ import annotations

import torch

from tieredkv.policy import prune


def tokens(saliency, is_text=None, sinks=0, pool=1, keys=None, values=None):
    """One static head's tokens as a rule sees them."""
    is_text = torch.zeros(len(saliency)).bool() if is_text is None else is_text
    return prune.HeadTokens(saliency, is_text, sinks, pool, lambda: (keys, values))


def test_pooling_averages_neighbours_and_keeps_the_edges_fair():
    pooled = prune.pool_saliency(torch.tensor([[3.0, 0.0, 0.0, 6.0]]), 3)
    torch.testing.assert_close(pooled, torch.tensor([[1.5, 1.0, 2.0, 3.0]]))


def test_text_comes_before_any_visual_token_and_sinks_before_all():
    saliency = torch.tensor([0.0, 0.9, 0.1, 0.8, 0.2, 0.3])
    is_text = torch.tensor([False, False, True, False, True, False])
    rank = prune.text_prior(tokens(saliency, is_text, sinks=1))
    assert [prune.kept_tokens(rank, budget).tolist() for budget in (1, 2, 4)] == [[0], [0, 4], [0, 1, 2, 4]]


def test_of_text_beyond_the_budget_the_most_salient_is_kept():
    saliency = torch.tensor([0.3, 0.1, 0.2, 0.9])
    is_text = torch.tensor([True, True, True, False])
    assert prune.kept_tokens(prune.text_prior(tokens(saliency, is_text)), 2).tolist() == [0, 2]


def test_a_budget_beyond_the_tokens_keeps_all():
    assert prune.kept_tokens(torch.rand(5), 99).tolist() == [0, 1, 2, 3, 4]
