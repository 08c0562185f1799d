"""Each formula against a slow, obvious version; invariances."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near

from tieredkv.policy import select
from tieredkv.policy.digests import sketch, vectors

# ---- digest


def test_cuboid_mean_by_hand():
    keys = torch.tensor([[0.0, 1.0], [4.0, 1.0], [1.0, 1.0]])  # centre (2, 1), mean distance (5/3, 0)
    low, high = vectors.cuboid_mean(keys)
    torch.testing.assert_close(low, torch.tensor([2 - 5 / 3, 1.0]))
    torch.testing.assert_close(high, torch.tensor([2 + 5 / 3, 1.0]))


def exact_dot(vectors):
    """Products with vectors `(K, n, V, D)` that were never packed."""
    return lambda query, v: query @ vectors[:, :, v].transpose(1, 2)


def test_box_score_takes_the_better_corner_of_every_channel():
    query, digests = torch.randn(2, 3, 8), torch.randn(2, 5, 2, 8).sort(dim=2).values
    got = vectors.box_score(query, exact_dot(digests))
    for head in range(2):
        for row in range(3):
            for chunk in range(5):
                low, high = digests[head, chunk]
                want = torch.maximum(query[head, row] * low, query[head, row] * high).sum()
                torch.testing.assert_close(got[head, row, chunk], want)


def test_min_max_bounds_every_key_of_the_chunk():
    query, keys = torch.randn(1, 4, 8), torch.randn(1, 6, 16, 8)
    bound = vectors.box_score(query, exact_dot(vectors.min_max(keys)))
    assert (bound + 1e-5 >= torch.einsum("kgd,kncd->kgnc", query, keys).amax(-1)).all()


def test_the_mean_digest_is_the_mean_logit():
    query, keys = torch.randn(1, 4, 8), torch.randn(1, 6, 16, 8)
    got = vectors.point_score(query, exact_dot(vectors.mean(keys)))
    torch.testing.assert_close(got, torch.einsum("kgd,kncd->kgnc", query, keys).mean(-1))


def test_a_segment_holds_keys_that_lie_on_a_line():
    """Then the best of its ends is the best key, for any query."""
    start, direction = torch.randn(8), torch.randn(8)
    keys = start + torch.rand(1, 1, 16, 1) * direction
    query = torch.randn(1, 5, 8)
    got = vectors.end_score(query, exact_dot(vectors.segment(keys)))
    want = torch.einsum("kgd,kncd->kgnc", query, keys).amax(-1)
    assert_near(got, want)


def test_a_segment_runs_along_the_first_principal_component():
    keys = torch.randn(12, 6) @ torch.diag(torch.tensor([9.0, 2, 1, 1, 1, 1]))
    low, high = vectors.segment(keys)
    principal = torch.linalg.svd(keys - keys.mean(0)).Vh[0]
    along = (keys - keys.mean(0)) @ principal
    got = torch.stack((low - keys.mean(0), high - keys.mean(0))) @ principal
    torch.testing.assert_close(got.sort().values, torch.stack((along.min(), along.max())), atol=0.2, rtol=0)
    assert torch.cosine_similarity(high - low, principal, dim=0).abs() > 0.999


def test_a_segment_finds_its_direction_where_others_are_nearly_as_strong():
    generator = torch.Generator().manual_seed(6)
    keys = torch.randn(20, 64, 6, generator=generator) * torch.tensor([3.0, 2, 2, 2, 2, 2])
    low, high = vectors.segment(keys).unbind(1)
    principal = torch.linalg.svd(keys - keys.mean(1, keepdim=True)).Vh[:, 0]
    assert torch.cosine_similarity(high - low, principal, dim=-1).abs().mean() > 0.97


VECTORS = {
    "mean": (vectors.mean, vectors.point_score),
    "minmax": (vectors.min_max, vectors.box_score),
    "cuboid": (vectors.cuboid_mean, vectors.box_score),
    "segment": (vectors.segment, vectors.end_score),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_a_digest_ignores_the_order_of_its_keys(kind):
    keys, query = torch.randn(1, 2, 16, 4), torch.randn(1, 3, 4)
    make, score = VECTORS[kind]
    mixed = make(keys[:, :, torch.randperm(16)])
    same, other = score(query, exact_dot(make(keys))), score(query, exact_dot(mixed))
    torch.testing.assert_close(same, other, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", VECTORS)
def test_a_chunk_of_equal_keys_is_scored_exactly(kind):
    key, query = torch.randn(8), torch.randn(1, 1, 8)
    make, score = VECTORS[kind]
    vectors = make(key.expand(1, 1, 16, 8))
    torch.testing.assert_close(score(query, exact_dot(vectors)).squeeze(), query.squeeze() @ key)


@pytest.mark.parametrize("kind", VECTORS)
def test_a_constant_added_to_all_keys_changes_no_ranking(kind):
    """It adds the same to every logit, as it does in attention."""
    keys, query, constant = torch.randn(1, 9, 16, 8), torch.randn(1, 3, 8), torch.randn(8)
    make, score = VECTORS[kind]
    before = score(query, exact_dot(make(keys)))
    after = score(query, exact_dot(make(keys + constant)))
    torch.testing.assert_close(after - before, (query @ constant).unsqueeze(-1).expand_as(before), atol=2e-2, rtol=0)


@pytest.mark.parametrize("kind", VECTORS)
def test_permuted_chunks_are_ranked_alike(kind):
    keys, query, order = torch.randn(1, 9, 16, 8), torch.randn(1, 3, 8), torch.randperm(9)
    make, score = VECTORS[kind]
    before = score(query, exact_dot(make(keys)))
    torch.testing.assert_close(score(query, exact_dot(make(keys[:, order]))), before[..., order])


@pytest.mark.parametrize("bits", vectors.BITS)
def test_packed_products_are_those_of_rounded_vectors(bits):
    whole, query = torch.randn(2, 5, 8) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 7.0]).view(5, 1), torch.randn(2, 3, 8)
    most = 2 ** (bits - 1) - 1
    scale = (whole.abs().amax(-1, keepdim=True) / most).clamp(min=1e-7).half().float()
    rounded = (whole / scale).round().clamp(-most, most) * scale
    packed = vectors.pack(whole, bits)
    assert packed.shape == (2, 5, vectors.packed_bytes(8, bits))
    got = vectors.dots(query, packed, bits)
    assert_near(got, query @ rounded.transpose(1, 2))


def test_eight_bits_are_as_good_as_all_of_them():
    keys, query = torch.randn(2, 40, 16, 32), torch.randn(2, 3, 32)
    made = vectors.DIGESTS["cuboid"]
    exact = vectors.box_score(query, exact_dot(vectors.cuboid_mean(keys)))
    packed = made.make(keys, 8, None)
    assert packed.shape == (2, 40, made.packed_bytes(32, 16, 8))
    assert (made.logits(query, packed, 8, None) - exact).abs().max() < 0.25
    assert exact.abs().mean() > 5


# ---- sketch


def spread(heads, tokens, d, generator):
    """Keys and queries that live mostly in few, different directions, as trained ones do."""
    strength = torch.logspace(1, -2, d)
    keys = torch.randn(heads, tokens, d, generator=generator) * strength
    return keys @ torch.linalg.qr(torch.randn(heads, d, d, generator=generator)).Q + 3


@pytest.mark.parametrize("bits", vectors.BITS)
def test_sketched_products_are_near_the_true_ones(bits):
    generator = torch.Generator().manual_seed(0)
    keys, queries = spread(2, 512, 16, generator), torch.randn(2, 300, 16, generator=generator)
    basis = sketch.fit(queries.transpose(1, 2) @ queries, keys, bits)
    packed = sketch.pack(keys.view(2, 32, 16, 16), bits, basis)
    assert packed.shape == (2, 32, sketch.packed_bytes(16, 16, bits))
    got = sketch.token_logits(queries[:, :5] @ basis.up, packed, bits)
    want = queries[:, :5] @ (keys - keys.mean(1, keepdim=True)).transpose(1, 2)
    error = (got - want).std() / want.std()
    assert error < (0.3 if bits == 4 else 0.05)


def test_a_basis_keeps_the_directions_that_queries_look_in():
    """Keys differ alike in all directions; queries have only half of them."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 400, 16, generator=generator)
    queries = torch.randn(1, 200, 8, generator=generator) @ torch.eye(16)[8:]
    basis = sketch.fit(queries.transpose(1, 2) @ queries, keys, 8)
    packed = sketch.pack(keys.view(1, 25, 16, 16), 8, basis)
    want = queries[:, :4] @ (keys - keys.mean(1, keepdim=True)).transpose(1, 2)
    torch.testing.assert_close(sketch.token_logits(queries[:, :4] @ basis.up, packed, 8), want, atol=0.15, rtol=0)


@pytest.mark.parametrize("d", [18, 20, 80])
def test_any_head_dim_is_sketched(d):
    generator = torch.Generator().manual_seed(4)
    keys, queries = spread(1, 64, d, generator), torch.randn(1, 60, d, generator=generator)
    basis = sketch.fit(queries.transpose(1, 2) @ queries, keys, 4)
    packed = sketch.pack(keys.view(1, 8, 8, d), 4, basis)
    assert packed.shape == (1, 8, sketch.packed_bytes(d, 8, 4))
    for_ranking = basis.for_ranking(torch.tensor([0]))
    assert for_ranking.nbytes == sketch.ranking_basis_bytes(d, 4)
    assert sketch.chunk_logits(queries[:, :2], packed, 4, for_ranking).shape == (1, 2, 8)


def test_chunks_are_ranked_by_the_mass_of_their_tokens():
    generator = torch.Generator().manual_seed(2)
    keys, queries = spread(2, 320, 16, generator), torch.randn(2, 60, 16, generator=generator)
    basis = sketch.fit(queries.transpose(1, 2) @ queries, keys, 8)
    packed = sketch.pack(keys.view(2, 20, 16, 16), 8, basis)
    got = sketch.chunk_logits(queries[:, :3], packed, 8, basis)
    logits = sketch.token_logits(queries[:, :3] @ basis.up, packed, 8)
    want = torch.stack([part.exp().sum(-1).log() for part in logits.split(16, dim=-1)], dim=-1)
    assert_near(got, want)


def test_a_constant_added_to_all_keys_changes_no_sketch():
    generator = torch.Generator().manual_seed(3)
    keys, queries = spread(1, 128, 16, generator), torch.randn(1, 60, 16, generator=generator)
    moment = queries.transpose(1, 2) @ queries

    def logits(keys):
        basis = sketch.fit(moment, keys, 8)
        return sketch.token_logits(queries[:, :3] @ basis.up, sketch.pack(keys.view(1, 8, 16, 16), 8, basis), 8)

    got = logits(keys + torch.randn(16, generator=generator))
    torch.testing.assert_close(got, logits(keys), atol=0.1, rtol=0)


# ---- select


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
