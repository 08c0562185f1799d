"""Scores of heads, and the tokens they need, against slow and obvious versions."""

from __future__ import annotations

import pytest
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


def by_sorting(halves: torch.Tensor, sinks: int, recent: int, shares: tuple[float, ...]) -> torch.Tensor:
    """`tokens_to_cover` by its definition: all tokens are sorted, and every number of them is tried."""
    n = halves.shape[-1]
    old, first = n - recent, min(sinks, n - recent)
    covered = torch.zeros((halves.shape[1], old - first + 1), dtype=torch.float64)
    for chosen, seen in ((halves[0], halves[1]), (halves[1], halves[0])):
        order = chosen[:, first:old].argsort(dim=-1, descending=True, stable=True)
        covered[:, 1:] += seen[:, first:old].double().gather(1, order).cumsum(-1)
        covered += seen[:, old:].double().sum(-1, keepdim=True)
    enough = torch.stack([covered >= share * covered[:, -1:] for share in shares])
    return torch.where(enough.any(-1), enough.byte().argmax(-1), n + 1)


@pytest.mark.parametrize("largest", [1, 3, 40, 2**12], ids=lambda largest: f"weights up to {largest}")
@pytest.mark.parametrize("tokens", [1, 2, 40, 3000])
def test_tokens_to_cover_equals_sorting_all_tokens(tokens, largest):
    """Whole numbers as weights, and shares in sixteenths: sums are exact, and there are many ties."""
    generator = torch.Generator().manual_seed(tokens + largest)
    for sinks, recent in ((0, 0), (0, tokens // 2), (tokens // 3, 1), (tokens, 1), (0, tokens)):
        halves = torch.randint(0, largest + 1, (2, 3, tokens), generator=generator).float()
        halves[:, 1] = torch.where(torch.rand(tokens, generator=generator) < 0.9, 0.0, halves[:, 1])
        shares = (0.0, 0.0625, 0.5, 0.9375, 1.0, 1.5)
        got = classify.tokens_to_cover(halves, sinks, recent, shares)
        assert torch.equal(got, by_sorting(halves, sinks, recent, shares)), (sinks, recent)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_attention_that_is_not_a_number_is_never_covered(sign):
    """The bits of a NaN may have either sign."""
    halves = torch.full((2, 2, 40), 1 / 40)
    halves[0, 1, 7] = torch.tensor(float("nan")).copysign(torch.tensor(sign))
    need = classify.tokens_to_cover(halves, 0, 8, (0.5,))
    assert need[0, 0] <= 32
    assert need[0, 1] == 41


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
