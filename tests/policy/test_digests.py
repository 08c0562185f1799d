"""Digests: each kind against a slow, obvious version; invariances; the contract, of every kind."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near

from tieredkv.policy.digests import BITS, DIGESTS, Fitted, vectors
from tieredkv.policy.digests.sketch import Sketch

# ---- digests of vectors


def digest(name, d=8, c=16, bits=8):
    return DIGESTS[name](d, c, bits)


def test_cuboid_mean_by_hand():
    keys = torch.tensor([[0.0, 1.0], [4.0, 1.0], [1.0, 1.0]])  # centre (2, 1), mean distance (5/3, 0)
    low, high = digest("cuboid").vectors(keys)
    torch.testing.assert_close(low, torch.tensor([2 - 5 / 3, 1.0]))
    torch.testing.assert_close(high, torch.tensor([2 + 5 / 3, 1.0]))


def exact_dot(vectors):
    """Products with vectors `(K, n, V, D)` that were never packed."""
    return lambda query, v: query @ vectors[:, :, v].transpose(1, 2)


def estimate(name, query, keys):
    """Logits of chunks `(K, n, C, D)` by a digest that was never packed."""
    kind = digest(name, keys.shape[3], keys.shape[2])
    return kind.score(query, exact_dot(kind.vectors(keys)))


def test_box_score_takes_the_better_corner_of_every_channel():
    query, digests = torch.randn(2, 3, 8), torch.randn(2, 5, 2, 8).sort(dim=2).values
    got = digest("minmax").score(query, exact_dot(digests))
    for head in range(2):
        for row in range(3):
            for chunk in range(5):
                low, high = digests[head, chunk]
                want = torch.maximum(query[head, row] * low, query[head, row] * high).sum()
                torch.testing.assert_close(got[head, row, chunk], want)


def test_min_max_bounds_every_key_of_the_chunk():
    query, keys = torch.randn(1, 4, 8), torch.randn(1, 6, 16, 8)
    bound = estimate("minmax", query, keys)
    assert (bound + 1e-5 >= torch.einsum("kgd,kncd->kgnc", query, keys).amax(-1)).all()


def test_the_mean_digest_is_the_mean_logit():
    query, keys = torch.randn(1, 4, 8), torch.randn(1, 6, 16, 8)
    got = estimate("mean", query, keys)
    torch.testing.assert_close(got, torch.einsum("kgd,kncd->kgnc", query, keys).mean(-1))


def test_a_segment_holds_keys_that_lie_on_a_line():
    """Then the best of its ends is the best key, for any query."""
    start, direction = torch.randn(8), torch.randn(8)
    keys = start + torch.rand(1, 1, 16, 1) * direction
    query = torch.randn(1, 5, 8)
    got = estimate("segment", query, keys)
    want = torch.einsum("kgd,kncd->kgnc", query, keys).amax(-1)
    assert_near(got, want)


def test_a_segment_runs_along_the_first_principal_component():
    keys = torch.randn(12, 6) @ torch.diag(torch.tensor([9.0, 2, 1, 1, 1, 1]))
    low, high = digest("segment", 6).vectors(keys)
    principal = torch.linalg.svd(keys - keys.mean(0)).Vh[0]
    along = (keys - keys.mean(0)) @ principal
    got = torch.stack((low - keys.mean(0), high - keys.mean(0))) @ principal
    torch.testing.assert_close(got.sort().values, torch.stack((along.min(), along.max())), atol=0.2, rtol=0)
    assert torch.cosine_similarity(high - low, principal, dim=0).abs() > 0.999


def test_a_segment_finds_its_direction_where_others_are_nearly_as_strong():
    generator = torch.Generator().manual_seed(6)
    keys = torch.randn(20, 64, 6, generator=generator) * torch.tensor([3.0, 2, 2, 2, 2, 2])
    low, high = digest("segment", 6).vectors(keys).unbind(1)
    principal = torch.linalg.svd(keys - keys.mean(1, keepdim=True)).Vh[:, 0]
    assert torch.cosine_similarity(high - low, principal, dim=-1).abs().mean() > 0.97


VECTORS = pytest.mark.parametrize("kind", ["mean", "minmax", "cuboid", "segment"])


@VECTORS
def test_a_digest_ignores_the_order_of_its_keys(kind):
    keys, query = torch.randn(1, 2, 16, 4), torch.randn(1, 3, 4)
    same, mixed = estimate(kind, query, keys), estimate(kind, query, keys[:, :, torch.randperm(16)])
    torch.testing.assert_close(same, mixed, atol=0.02, rtol=0.02)


@VECTORS
def test_a_chunk_of_equal_keys_is_scored_exactly(kind):
    key, query = torch.randn(8), torch.randn(1, 1, 8)
    torch.testing.assert_close(estimate(kind, query, key.expand(1, 1, 16, 8)).squeeze(), query.squeeze() @ key)


@VECTORS
def test_a_constant_added_to_all_keys_changes_no_ranking(kind):
    """It adds the same to every logit, as it does in attention."""
    keys, query, constant = torch.randn(1, 9, 16, 8), torch.randn(1, 3, 8), torch.randn(8)
    before, after = estimate(kind, query, keys), estimate(kind, query, keys + constant)
    torch.testing.assert_close(after - before, (query @ constant).unsqueeze(-1).expand_as(before), atol=2e-2, rtol=0)


@VECTORS
def test_permuted_chunks_are_ranked_alike(kind):
    keys, query, order = torch.randn(1, 9, 16, 8), torch.randn(1, 3, 8), torch.randperm(9)
    torch.testing.assert_close(estimate(kind, query, keys[:, order]), estimate(kind, query, keys)[..., order])


@pytest.mark.parametrize("bits", BITS)
def test_packed_products_are_those_of_rounded_vectors(bits):
    whole, query = torch.randn(2, 5, 8) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 7.0]).view(5, 1), torch.randn(2, 3, 8)
    most = 2 ** (bits - 1) - 1
    scale = (whole.abs().amax(-1, keepdim=True) / most).clamp(min=1e-7).half().float()
    rounded = (whole / scale).round().clamp(-most, most) * scale
    packed = vectors.pack(whole, bits)
    assert packed.shape == (2, 5, vectors.packed_bytes(8, bits))
    got = vectors.dots(query, packed, bits)
    assert_near(got, query @ rounded.transpose(1, 2))


@pytest.mark.parametrize("bits", BITS)
def test_logits_in_eight_bits_are_close_and_in_four_less_so(bits):
    keys, query = torch.randn(2, 40, 16, 32), torch.randn(2, 3, 32)
    exact, kind = estimate("cuboid", query, keys), digest("cuboid", 32, 16, bits)
    packed = kind.make(keys, Fitted())
    assert packed.shape == (2, 40, kind.chunk_bytes)
    assert (kind.logits(query, packed, 40) - exact).abs().max() < (0.25 if bits == 8 else 4)
    assert exact.abs().mean() > 5


@pytest.mark.parametrize("name", DIGESTS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("d", [16, 20])
def test_a_digest_keeps_its_contract(name, bits, d):
    """Its sizes are those of its tensors, and ranking in parts of any size gives the same logits."""
    keys, query = torch.randn(3, 10, 8, d), torch.randn(3, 5, d)
    kind = digest(name, d, 8, bits)
    fitted = kind.fit(torch.eye(d).expand(3, d, d), keys.flatten(1, 2))
    assert (type(fitted), fitted.nbytes) == (kind.fitted_type, 3 * kind.fitted_bytes)
    packed, own = kind.make(keys, fitted), fitted.for_ranking(torch.tensor([2, 0]))
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, 10, kind.chunk_bytes))
    assert own.nbytes == 2 * kind.ranking_fitted_bytes
    whole = kind.logits(kind.prepare(query[[2, 0]], own), packed[[2, 0]], 10)
    assert (whole.dtype, whole.shape) == (torch.float32, (2, 5, 10))
    assert kind.constant(query[[2, 0]], own).shape == (2, 5)
    assert_near(kind.logits(kind.prepare(query[[2, 0]], own), packed[[2, 0]], 3), whole)


@pytest.mark.parametrize("name", DIGESTS)
@pytest.mark.parametrize("bits", BITS)
def test_ranking_allocates_no_more_than_its_scratch_bytes(name, bits):
    """By torch's own profiler: the result, in parts and joined, and the scratch of one part."""
    keys, query, at_once = torch.randn(2, 256, 8, 64), torch.randn(2, 4, 64), 64
    kind = digest(name, 64, 8, bits)
    fitted = kind.fit(torch.eye(64).expand(2, 64, 64), keys.flatten(1, 2))
    packed, prepared = kind.make(keys, fitted), kind.prepare(query, fitted)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = kind.logits(prepared, packed, at_once)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert result.nbytes < peak <= 2 * result.nbytes + at_once * kind.scratch_bytes(2, 8)


# ---- sketch


def spread(heads, tokens, d, generator):
    """Keys and queries that lie mostly along a few, different directions, as trained ones do."""
    strength = torch.logspace(1, -2, d)
    keys = torch.randn(heads, tokens, d, generator=generator) * strength
    return keys @ torch.linalg.qr(torch.randn(heads, d, d, generator=generator)).Q + 3


def fit(queries, keys, bits, c):
    """A sketch for chunks of `c` tokens, its basis for keys `(K, m, D)`, and their digests."""
    kind = Sketch(keys.shape[-1], c, bits)
    basis = kind.fit(queries.transpose(1, 2) @ queries, keys)
    return kind, basis, kind.make(keys.unflatten(1, (-1, c)), basis)


def token_logits(queries, keys, bits):
    """Logits of every key: chunks have one token, and queries are so short that no mass underflows."""
    kind, basis, packed = fit(queries, keys, bits, 1)
    return lambda some: kind.chunk_logits(kind.prepare(some / 128, basis), packed) * 128


@pytest.mark.parametrize("bits", BITS)
def test_sketched_products_are_near_the_true_ones(bits):
    generator = torch.Generator().manual_seed(0)
    keys, queries = spread(2, 512, 16, generator), torch.randn(2, 300, 16, generator=generator)
    got = token_logits(queries, keys, bits)(queries[:, :5])
    want = queries[:, :5] @ (keys - keys.mean(1, keepdim=True)).transpose(1, 2)
    error = (got - want).std() / want.std()
    assert error < (0.3 if bits == 4 else 0.05)


def test_a_basis_keeps_the_directions_of_the_queries():
    """Keys differ alike in all directions; queries have only half of them."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(1, 400, 16, generator=generator)
    queries = torch.randn(1, 200, 8, generator=generator) @ torch.eye(16)[8:]
    want = queries[:, :4] @ (keys - keys.mean(1, keepdim=True)).transpose(1, 2)
    torch.testing.assert_close(token_logits(queries, keys, 8)(queries[:, :4]), want, atol=0.15, rtol=0)


@pytest.mark.parametrize("d", [18, 20, 80])
def test_any_head_dim_is_sketched(d):
    generator = torch.Generator().manual_seed(4)
    keys, queries = spread(1, 64, d, generator), torch.randn(1, 60, d, generator=generator)
    kind, basis, packed = fit(queries, keys, 4, 8)
    assert packed.shape == (1, 8, kind.chunk_bytes)
    for_ranking = basis.for_ranking(torch.tensor([0]))
    assert for_ranking.nbytes == kind.ranking_fitted_bytes
    assert kind.logits(kind.prepare(queries[:, :2], for_ranking), packed, 8).shape == (1, 2, 8)


@pytest.mark.parametrize("bits", BITS)
def test_chunks_are_ranked_by_the_mass_of_their_tokens(bits):
    generator = torch.Generator().manual_seed(2)
    keys, queries = spread(2, 320, 16, generator), torch.randn(2, 60, 16, generator=generator)
    kind, basis, packed = fit(queries, keys, bits, 16)
    got = kind.chunk_logits(kind.prepare(queries[:, :3], basis), packed)
    logits = token_logits(queries, keys, bits)(queries[:, :3])
    want = torch.stack([part.exp().sum(-1).log() for part in logits.split(16, dim=-1)], dim=-1)
    assert_near(got, want)


def test_logits_and_their_constant_are_the_mass_of_a_chunk():
    generator = torch.Generator().manual_seed(2)
    keys, queries = spread(2, 320, 16, generator), torch.randn(2, 60, 16, generator=generator)
    kind, basis, packed = fit(queries, keys, 8, 16)
    got = kind.logits(kind.prepare(queries[:, :3], basis), packed, 20) + kind.constant(queries[:, :3], basis)[..., None]
    want = (queries[:, :3] @ keys.mT).unflatten(-1, (-1, 16)).logsumexp(-1)
    assert (got - want).abs().mean() < 0.3


def test_a_constant_added_to_all_keys_changes_no_sketch():
    generator = torch.Generator().manual_seed(3)
    keys, queries = spread(1, 128, 16, generator), torch.randn(1, 60, 16, generator=generator)

    def logits(keys):
        return token_logits(queries, keys, 8)(queries[:, :3])

    got = logits(keys + torch.randn(16, generator=generator))
    torch.testing.assert_close(got, logits(keys), atol=0.1, rtol=0)
