"""Digests, ranks and attention masses of chunks by Triton's kernels, against torch."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near

from tieredkv.ops import torch_ops
from tieredkv.ops.select import TORCH
from tieredkv.policy import select
from tieredkv.policy.digests import DIGESTS
from tieredkv.policy.digests.sketch import Sketch
from tieredkv.policy.digests.walsh import Walsh

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("heads", "group", "c", "d", "chunks"), [(3, 3, 8, 64, 37), (1, 7, 16, 128, 20), (2, 1, 32, 32, 9)]
)
def test_sketch_logits(kernels, device, bits, heads, group, c, d, chunks):
    keys, queries = torch.randn(heads, chunks, c, d), torch.randn(heads, group, d)
    digest = Sketch(d, c, bits)
    basis = digest.fit(torch.eye(d).expand(heads, d, d), keys.flatten(1, 2))
    packed, prepared = digest.make(keys, basis), digest.prepare(queries, basis)
    got, parts = kernels.digest(digest).logits_in_parts(prepared.to(device), packed.to(device), 1)
    # On a card the products are in TF32: ten bits of the queries, as in float16, and all bits of a sketch.
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    assert_near(got.cpu(), digest.chunk_logits(prepared, packed), dtype)
    assert_near(parts.logsumexp(-1), got.logsumexp(-1))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "c", "d", "chunks"), [(3, 8, 64, 11), (2, 16, 80, 5), (1, 32, 32, 3)])
def test_sketches_are_packed(kernels, device, bits, dtype, heads, c, d, chunks):
    """Keys and values are interleaved, as staged chunks are."""
    staged = torch.randn(heads, chunks, 2, c, d).to(dtype)
    keys = staged[:, :, 0]
    digest = Sketch(d, c, bits)
    basis = digest.fit(torch.eye(d).expand(heads, d, d), keys.flatten(1, 2))
    got = kernels.digest(digest).make(staged.to(device)[:, :, 0], basis.to(device)).cpu()
    want = digest.make(keys, basis)
    assert got.shape == want.shape
    assert (got != want).float().mean() < 0.002  # keys halfway between two steps may be rounded either way


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("heads", "group", "c", "d", "chunks"),
    [(3, 3, 8, 64, 37), (1, 7, 16, 128, 20), (2, 1, 32, 32, 9), (1, 2, 8, 20, 3)],
)
def test_logits_of_blocks(kernels, device, bits, heads, group, c, d, chunks):
    keys, queries = torch.randn(heads, chunks, c, d), torch.randn(heads, group, d)
    digest = Walsh(d, c, bits)
    fitted = digest.fit(torch.eye(d).expand(heads, d, d), keys.flatten(1, 2))
    packed, prepared = digest.make(keys, fitted), digest.prepare(queries, fitted)
    assert type(kernels.digest(digest)) is not Walsh
    got, parts = kernels.digest(digest).logits_in_parts(prepared.to(device), packed.to(device), 1)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    assert_near(got.cpu(), digest.chunk_logits(prepared, packed), dtype)
    assert_near(parts.logsumexp(-1), got.logsumexp(-1))


@pytest.mark.parametrize("kind", [Sketch, Walsh])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("group", "d", "bits"), [(3, 64, 4), (1, 80, 8), (20, 16, 4)])
def test_queries_are_projected(kernels, device, kind, dtype, group, d, bits):
    """Those of some heads only, as a model leaves them: next to the other tensors that one product makes."""
    digest, keys = kind(d, 8, bits), torch.randn(3, 20 * 8, d)
    fitted = digest.fit(torch.eye(d).expand(3, d, d), keys).for_ranking(heads := torch.tensor([2, 0]))
    query = torch.randn(3, group, 2, d).to(dtype)[:, :, 1]
    want, want_constant = digest.project(query, heads, 0.3, fitted)
    got, constant = kernels.digest(digest).project(query.to(device), heads.to(device), 0.3, fitted.to(device))
    assert_near(got.cpu(), want)
    assert_near(constant.cpu(), want_constant)


@pytest.mark.parametrize("kind", [Sketch, Walsh])
def test_chunks_of_a_size_without_a_kernel_are_ranked_by_torch(kernels, device, kind):
    """Twelve is not a power of two."""
    digest, keys, queries = kind(16, 12, 4), torch.randn(2, 7, 12, 16), torch.randn(2, 3, 16)
    basis = digest.fit(torch.eye(16).expand(2, 16, 16), keys.flatten(1, 2))
    packed, prepared = digest.make(keys, basis).to(device), digest.prepare(queries, basis).to(device)
    assert type(kernels.digest(digest)) is not kind
    got, parts = kernels.digest(digest).logits_in_parts(prepared, packed, 3)
    assert parts is None
    assert_near(got, digest.chunk_logits(prepared, packed))


def test_digests_without_kernels_are_those_of_torch(kernels):
    digest = DIGESTS["cuboid"](16, 8, 8)
    assert kernels.digest(digest) is digest
    assert TORCH.digest(digest) is digest


@pytest.mark.parametrize(("group", "stay"), [("mean", 2.0), ("mean", 1.0), ("max", 3.0), ("max_logit", 1.0)])
@pytest.mark.parametrize("chunks", [5, 1024, 2500])
def test_chunk_ranks(kernels, device, group, stay, chunks):
    logits, chosen = 3 * torch.randn(2, 3, chunks), torch.rand(2, chunks) < 0.2
    want = select.chunk_ranks(logits, chosen, group, stay)
    in_parts = torch.stack([part.logsumexp(-1) for part in logits.split(2, dim=-1)], dim=-1)
    for parts in (None, in_parts.to(device)):
        assert_near(kernels.chunk_ranks(logits.to(device), chosen.to(device), group, stay, parts).cpu(), want)


@pytest.mark.parametrize("chunks", [5, 700, 5000])
def test_mass_that_was_not_chosen(kernels, device, chunks):
    logits, chosen, constant = 9 * torch.randn(2, 3, chunks), torch.rand(2, chunks) < 0.3, torch.randn(2, 3)
    for given in (None, constant):
        on_device = None if given is None else given.to(device)
        got = kernels.log_mass_without(logits.to(device), chosen.to(device), on_device)
        assert_near(got.cpu(), select.log_mass_without(logits, chosen, given))


def test_the_share_that_was_not_seen_is_recorded(kernels, device):
    unselected, lse, heads = 3 * torch.randn(2, 7), 3 * torch.randn(4, 7), torch.tensor([3, 1])
    unselected[0, 2] = -float("inf")  # everything was chosen
    unseen, total = torch.full((2,), 9.0), torch.tensor([1.0, 0.25], dtype=torch.float64)
    got_unseen, got_total = unseen.clone().to(device), total.clone().to(device)
    torch_ops.record_unseen(unselected, lse, heads, unseen, total)
    kernels.record_unseen(*(part.to(device) for part in (unselected, lse, heads)), got_unseen, got_total)
    assert_near(got_unseen.cpu(), unseen)
    torch.testing.assert_close(got_total.cpu(), total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total - torch.tensor([1.0, 0.25]), unseen.double())


@pytest.mark.parametrize("columns", [40, 1500])
def test_heads_adapt_to_what_was_not_seen(kernels, device, columns):
    """More, as much, or less, within limits; only the columns of selected chunks count."""
    selected, heads = torch.tensor([10, 11, 12, 38, 9]), torch.tensor([5, 0, 2, 1, 4])
    unseen = torch.tensor([0.2, 0.07, 0.01, 0.9, 0.04])
    least, most = torch.tensor([4, 4, 4, 4, 8]), torch.full((5,), 40)
    found = []
    for ops, where in ((TORCH, torch.device("cpu")), (kernels, device)):
        lengths = torch.full((6, columns + 3), 5, dtype=torch.int32, device=where)
        counts, total = selected.clone().to(where), torch.full((5,), 100, device=where)
        limits = unseen.to(where), least.to(where), most.to(where)
        ops.adapt(counts, *limits, total, lengths, heads.to(where), 2, columns, 8)
        found.append((counts.cpu(), total.cpu(), lengths.cpu()))
    (want, total, lengths), got = found
    assert want.tolist() == [13, 11, 9, 40, 8]
    assert torch.equal(total, 100 + want)
    assert lengths[0].tolist() == [5] * 2 + [8] * 11 + [0] * (columns - 11) + [5]
    assert lengths[3].tolist() == [5] * (columns + 3)
    for each, wanted in zip(got, found[0], strict=True):
        assert torch.equal(each, wanted)


@pytest.mark.parametrize("chunks", [5, 300])
def test_mass_of_chunks_is_that_of_their_pages(kernels, device, chunks):
    """Heads in any order; of chunks that are not chosen nothing counts."""
    n, group, listed, first = 2, 3, chunks // 2 + 1, 2
    heads, page_lse, lse = torch.tensor([2, 0]), 3 * torch.randn(9, first + listed), torch.randn(3, group) + 5
    columns, chosen = torch.full((n, chunks + 1), 10**6, dtype=torch.int32), torch.zeros(n, chunks, dtype=torch.bool)
    want = torch.rand(chunks)
    mass = want.clone()
    for row in range(n):
        for column, chunk in enumerate(torch.randperm(chunks)[:listed].tolist()):
            chosen[row, chunk], columns[row, chunk] = True, column
            rows = slice(int(heads[row]) * group, int(heads[row] + 1) * group)
            want[chunk] += (page_lse[rows, first + column] - lse[heads[row]]).exp().sum()
    given = [page_lse, lse, chosen, columns, heads]
    got = mass.clone().to(device)
    kernels.add_mass(got, *(part.to(device) for part in given), first)
    torch_ops.add_mass(mass, *given, first)
    torch.testing.assert_close(mass, want)
    torch.testing.assert_close(got.cpu(), want)


def test_where_all_is_chosen_no_mass_is_left(kernels, device):
    logits, chosen = torch.randn(2, 3, 40, device=device), torch.ones(2, 40, dtype=torch.bool, device=device)
    assert bool((kernels.log_mass_without(logits, chosen) < -1e30).all())
