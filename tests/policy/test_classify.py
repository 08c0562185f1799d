"""Scores of heads, and the tokens they need, against slow and obvious versions."""

from __future__ import annotations

import torch

from tieredkv.policy import classify


def test_scores_of_blocks_equal_scores_of_the_whole():
    weights = torch.rand(2, 3, 5, 40).softmax(-1)
    best = None
    for block in weights.split(7, dim=-1):
        best = classify.merge_top_k(best, block, 6)
    want = torch.stack(
        [
            torch.stack([row.sort(descending=True).values[:6].sum() for row in head.flatten(0, 1)]).mean()
            for head in weights
        ]
    )
    torch.testing.assert_close(classify.text_centric_scores(best), want)


def test_a_head_that_attends_to_few_tokens_is_static_and_an_even_one_dynamic():
    sharp, even = torch.zeros(1, 4, 100), torch.full((1, 4, 100), 0.01)
    sharp[..., 3] = 1.0
    best = classify.merge_top_k(None, torch.stack((sharp, even)), 5)
    scores = classify.text_centric_scores(best)
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.05]))
    assert classify.static_heads(scores, 0.9).tolist() == [True, False]


def test_k_is_a_share_of_the_tokens_and_at_least_one():
    assert [classify.top_k_count(0.01, n) for n in (1, 100, 101, 100_000)] == [1, 1, 2, 1000]


def test_tokens_to_cover_against_trying_every_number():
    halves = torch.rand(2, 3, 40).softmax(-1)
    shares = (0.3, 0.6, 0.9, 1.5)
    for theta, got in zip(shares, classify.tokens_to_cover(halves, 0, 8, shares), strict=True):
        for head in range(3):
            want = 41
            for count in range(32, -1, -1):
                covered = 0.0
                for choosing, seeing in ((0, 1), (1, 0)):
                    kept = halves[choosing, head, :32].sort(descending=True).indices[:count]
                    covered += (halves[seeing, head, kept].sum() + halves[seeing, head, 32:].sum()) / 2
                if covered >= theta - 1e-6:
                    want = count
            assert int(got[head]) == want


def test_rows_that_attend_to_different_tokens_need_many_though_each_needs_few():
    """By the paper's score such a head is static; pruning by one row would lose what the next one attends to."""
    each, same = torch.zeros(2, 100), torch.zeros(2, 100)
    each[0, 3] = each[1, 60] = 1.0
    same[:, 3] = 1.0
    need = classify.tokens_to_cover(torch.stack((each, same), dim=1), 0, 8, (0.9,))[0]
    assert need[0] > 40
    assert need[1] == 1


def test_attention_to_the_sinks_is_left_out():
    """A head that attends mostly to sinks does not count as one that attends to few tokens."""
    halves = torch.zeros(2, 1, 100)
    halves[:, :, 0] = 0.9
    halves[0, 0, 20:30], halves[1, 0, 60:70] = 0.01, 0.01
    assert int(classify.tokens_to_cover(halves, 0, 8, (0.9,))) == 1
    assert int(classify.tokens_to_cover(halves, 4, 8, (0.9,))) > 30
