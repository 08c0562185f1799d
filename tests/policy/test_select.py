"""How chunks are ranked and how many are chosen: each formula against a slow, obvious version."""

from __future__ import annotations

import torch

from tieredkv.policy import select


def test_mean_share_is_the_mean_of_softmaxes():
    logits = torch.randn(2, 3, 10)
    want = torch.stack([torch.stack([row.softmax(0) for row in head]).mean(0) for head in logits])
    torch.testing.assert_close(select.mean_share(logits), want)


def test_chunks_chosen_before_stay_unless_others_look_better_by_the_factor():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]).log().unsqueeze(1)
    before = torch.tensor([[False, False, True, True], [True, False, False, False]])
    got = select.chunk_ranks(logits, before, "mean", 2.5)
    torch.testing.assert_close(got, torch.tensor([[0.4, 0.3, 0.5, 0.25], [0.25, 0.2, 0.3, 0.4]]))
    torch.testing.assert_close(select.chunk_ranks(logits, before, "mean", 1.0), logits[:, 0].exp())


def test_unseen_share_is_what_the_unchosen_chunks_hold():
    logits = torch.randn(2, 3, 6)
    chosen = torch.tensor([[1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]]).bool()
    seen = torch.randn(2, 3)
    got = select.unseen_share(select.log_mass_without(logits, chosen), seen)
    for head, ids in enumerate(([0, 4], [2])):
        rest = [i for i in range(6) if i not in ids]
        missed = logits[head][:, rest].exp().sum(-1)
        torch.testing.assert_close(got[head], (missed / (missed + seen[head].exp())).mean())


def test_heads_that_miss_much_select_more_and_never_beyond_their_slots():
    selected, least, most = torch.tensor([[8] * 4, [8, 8, 2, 2], [20, 9, 9, 20]])
    unseen = torch.tensor([0.5, 0.5, 0.0, 0.07])
    assert select.adapted(selected, unseen, least, most).tolist() == [10, 9, 6, 8]


def test_query_similarity_is_the_groups_mean_cosine():
    now, before = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    want = [[torch.cosine_similarity(now[k, g], before[k, g], dim=0) for g in range(3)] for k in range(2)]
    torch.testing.assert_close(select.query_similarity(now, before), torch.tensor(want).mean(1))
