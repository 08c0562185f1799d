"""Every Triton kernel against its twin in torch: compiled where there is a card, else interpreted."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import LateCopies, assert_near, pressed, text_config, tier_options
from transformers import LlamaForCausalLM

import tieredkv
from tieredkv import TieredCache
from tieredkv.codecs import CODECS, codec_for
from tieredkv.codecs.base import Codec, Fit
from tieredkv.environment.versions import cache_argument
from tieredkv.ops import torch_ops
from tieredkv.ops.base import Listing, Ops, Pages
from tieredkv.ops.select import TORCH, copying_by_torch, ops_for, triton
from tieredkv.policy import select
from tieredkv.policy.digests import DIGESTS
from tieredkv.policy.digests.sketch import Sketch
from tieredkv.policy.digests.walsh import Walsh

pytestmark = pytest.mark.interpreter


def on_host(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` in host memory that a kernel on `device` can read."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


@dataclass
class Chunks:
    """A host tier of one layer: a `Source`."""

    codec: Codec
    records: torch.Tensor

    def on_host(self, device: torch.device) -> Chunks:
        return Chunks(self.codec, on_host(self.records, device))


def fit_of(bits: int, heads: int, d: int) -> Fit:
    """What heads have in common: channels differ much in size. The same at every call."""
    centre, norms = torch.rand(2, heads, 2, d, generator=torch.Generator().manual_seed(d))
    norms = norms**2 * 2 + 0.01
    return Fit(centre * 6 - 2, norms / norms.norm(dim=-1, keepdim=True) if bits == 4 else norms)


def encoded(codec: Codec, keys: torch.Tensor, values: torch.Tensor, fit: Fit) -> torch.Tensor:
    """Records `(K, m, B)` of keys and values `(K, m * C, D)`; what the codec does not write is 0."""
    records = torch.zeros(len(keys), keys.shape[1] // codec.chunk_tokens, codec.chunk_bytes, dtype=torch.uint8)
    for field, stored in zip(codec.fields(records), codec.encode(keys, values, fit), strict=True):
        field.copy_(stored.unflatten(1, (-1, codec.chunk_tokens)))
    return records


def chunks_of(bits: int, tokens: torch.Tensor, c: int) -> Chunks:
    """Keys and values `(2, K, n, D)` in the host tier."""
    codec = codec_for(bits, c, tokens.shape[-1], tokens.dtype)
    return Chunks(codec, encoded(codec, *tokens, fit_of(bits, tokens.shape[1], tokens.shape[-1])))


def empty_pool(bits: int, slots: int, heads: int, c: int, d: int, dtype: torch.dtype, device: torch.device) -> Pages:
    codec = codec_for(bits, c, d, dtype)
    records = torch.zeros(slots, codec.chunk_bytes, dtype=torch.uint8, device=device)
    return Pages(codec, records, fit_of(bits, heads, d).to(device) if codec.needs_fit else None)


def moved(pages: Pages, device: torch.device) -> Pages:
    return Pages(pages.codec, pages.records.to(device), None if pages.fit is None else pages.fit.to(device))


def odd_tokens(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Keys and values `(..., D)`, some of which are hard to pack: all zero, not finite, very large, very small."""
    tokens = torch.randn(shape)
    rows = tokens.view(-1, shape[-1])
    rows[0] = 0
    rows[1, 3], rows[2, 5] = float("nan"), -float("inf")
    rows[3], rows[4] = rows[3] * 3e4, rows[4] * 1e-6
    return tokens.to(dtype)


def assert_encoded_alike(got: Pages, want: Pages) -> None:
    """Bitwise; on a card and in 4 bits, numbers halfway between two steps may be rounded either way."""
    bits, on_card = want.codec.bits, got.records.device.type == "cuda"
    near = 1 if on_card or bits == 4 else 0
    fields = zip(got.codec.fields(got.records.cpu()), want.codec.fields(want.records), strict=True)
    for found, wanted in fields:
        if wanted.dtype.is_floating_point:
            torch.testing.assert_close(found, wanted, atol=0, rtol=near * 1e-3, equal_nan=True)
            continue
        parts = [(found & 15, wanted & 15), (found >> 4, wanted >> 4)] if bits == 4 else [(found, wanted)]
        for numbers, numbers_wanted in parts:
            torch.testing.assert_close(numbers.int(), numbers_wanted.int(), atol=near, rtol=0)
            assert (numbers != numbers_wanted).float().mean() < 0.01


BITS = pytest.mark.parametrize("bits", sorted(CODECS), ids="{} bits".format)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SIZES = pytest.mark.parametrize(("c", "d"), [(8, 64), (12, 80), (32, 128)])
FROM_HOST = pytest.mark.parametrize(
    ("bits", "page_bits", "dtype"),
    [(16, 16, torch.float32), (16, 16, torch.bfloat16), (16, 8, torch.float32), (16, 8, torch.bfloat16),
     (16, 8, torch.float16), (8, 8, torch.bfloat16), (4, 4, torch.bfloat16)],
    ids=str,
)  # fmt: skip
"""Of the host tier, and of the pages."""


EVERY_SHAPE = [(3, 3, 64, 8, 21, 1), (2, 7, 80, 12, 5, 1), (1, 1, 128, 32, 7, 1), (1, 16, 96, 8, 9, 1),
               (1, 7, 256, 8, 5, 1), (2, 2, 32, 8, 9, 5), (1, 7, 64, 8, 3, 12), (1, 3, 128, 48, 3, 1)]  # fmt: skip
"""The last has pages longer than what a program reads at a time."""
SHAPES_OF_DTYPE = [
    (dtype, *shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for shape in EVERY_SHAPE
    if torch.cuda.is_available() or dtype == torch.float32 or shape in ((2, 7, 80, 12, 5, 1), (2, 2, 32, 8, 9, 5))
]
"""In the interpreter a shape does the same in every dtype: the others are tried with a padded shape, of one row and of
several. A compiled kernel is another one for each."""


@BITS
@pytest.mark.parametrize(("dtype", "heads", "group", "d", "c", "columns", "rows"), SHAPES_OF_DTYPE)
def test_attention_over_ragged_pages(kernels, device, bits, dtype, heads, group, d, c, columns, rows):
    fit, codec = fit_of(bits, heads, d), codec_for(bits, c, d, dtype)
    tokens = torch.randn(2, heads, columns * c, d)
    if bits == 8:
        tokens *= fit.channels.transpose(0, 1).unsqueeze(2)
    elif bits == 4:
        tokens += fit.centre.transpose(0, 1).unsqueeze(2)
    pages = Pages(codec, encoded(codec, *tokens.to(dtype), fit).flatten(0, 1), fit if codec.needs_fit else None)
    table = torch.stack([head * columns + torch.randperm(columns) for head in range(heads)]).int()
    lengths = torch.full((heads, columns), c, dtype=torch.int32)
    lengths[:, 2], lengths[0, 1] = 3, 0
    query = torch.randn(heads * group, rows, d).to(dtype)
    given = [part.to(device) for part in (query, table, lengths)]
    on_device = moved(pages, device)
    out, lse = kernels.paged_attention(given[0], on_device, *given[1:], d**-0.5, 8)
    want, want_lse = torch_ops.paged_attention(query, pages, table, lengths, d**-0.5, 8)
    assert_near(out.cpu(), want, dtype)
    assert_near(lse.cpu(), want_lse, dtype)
    if rows == 1:
        assert_pages_alike(kernels, on_device, given, lengths, dtype)


def assert_pages_alike(kernels: Ops, pages: Pages, given: list[torch.Tensor], lengths, dtype) -> None:
    """The log-sum-exp of each page as torch has it; pages, given: on the device. The output is as without."""
    query, table, _ = given
    rest = *given[1:], query.shape[-1] ** -0.5, 8
    got, want = (torch.full((len(query), table.shape[1] + 3), 7.0, device=query.device) for _ in range(2))
    out, _ = kernels.paged_attention(query, pages, *rest, got)
    assert torch.equal(out, kernels.paged_attention(query, pages, *rest)[0])
    narrow, _ = kernels.paged_attention(query, pages, *rest, dtype=dtype)
    assert narrow.dtype == dtype
    assert_near(narrow.float(), out, dtype)  # the interpreter cuts bfloat16 off
    torch_ops.paged_attention(query, pages, *rest, want)
    counts = torch.nn.functional.pad(lengths > 0, (0, 3), value=True).repeat_interleave(len(query) // len(table), 0)
    assert bool((got.cpu()[~counts] < -1e30).all())
    assert_near(got.cpu()[counts], want.cpu()[counts], dtype)


def filled_pool(bits: int, slots: int, device: torch.device) -> Pages:
    """Pages of four tokens of one head."""
    pages = empty_pool(bits, slots, 1, 4, 16, torch.float32, device)
    pages.records.copy_(encoded(pages.codec, *torch.randn(2, 1, slots * 4, 16), fit_of(bits, 1, 16))[0])
    return pages


@BITS
def test_what_lies_beyond_a_pages_length_is_not_read(kernels, device, bits):
    pages, query = filled_pool(bits, 3, device), torch.randn(2, 1, 16, device=device)
    table, lengths = torch.tensor([[0, 1, 2]], device=device).int(), torch.tensor([[4, 2, 0]], device=device).int()
    want, want_lse = kernels.paged_attention(query, pages, table, lengths, 1.0, 8)
    for field in pages.codec.fields(pages.records):
        field[1, 2:] = field[2] = float("nan") if field.dtype.is_floating_point else torch.iinfo(field.dtype).min
    out, lse = kernels.paged_attention(query, pages, table, lengths, 1.0, 8)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@BITS
@pytest.mark.parametrize("half", [0, 1], ids=["key", "value"])
def test_a_token_that_is_nan_makes_the_output_nan(kernels, device, bits, half):
    pages = filled_pool(bits, 2, device)
    fields = [field for field in pages.codec.fields(pages.records) if field.dtype.is_floating_point]
    fields[half][1, 2] = float("nan")
    table, lengths = torch.tensor([[0, 1]], device=device).int(), torch.tensor([[4, 4]], device=device).int()
    out, _ = kernels.paged_attention(torch.randn(2, 1, 16, device=device), pages, table, lengths, 1.0, 8)
    assert out.isnan().all()


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


@pytest.mark.parametrize("name", [name for name, part in vars(Ops).items() if name[0] != "_" and callable(part)])
def test_operations_have_the_parameters_that_the_contract_names(kernels, name):
    wanted = list(inspect.signature(getattr(Ops, name)).parameters)[1:]
    for ops in (TORCH, kernels):
        assert list(inspect.signature(getattr(ops, name)).parameters) == wanted, ops.name


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


@pytest.fixture(scope="module")
def shallow():
    """Two layers, as the interpreter is slow; the second may be prefetched for."""
    config = text_config("llama")
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_several_known_tokens_are_decoded_as_torch_decodes_them(kernels, device, shallow, long_ids):
    if device.type != "cpu":
        pytest.skip("the model is on the CPU")
    found = []
    for ops in (TORCH, kernels):
        options = {"gpu_kv_gb": 1, "budget_ratio": 0.1, "theta": 2.0, "text_window": 16, "chunk_tokens": 8}
        with (
            torch.no_grad(),
            tieredkv.use_attention(shallow),
            TieredCache(shallow.config, **tier_options(**options), ops=ops, max_new_tokens=8) as cache,
        ):
            shallow(long_ids[:, :300], **cache_argument(cache))
            cache.seal()
            with cache.forced():
                found.append(shallow(long_ids[:, 40:44], **cache_argument(cache)).logits[0])
    torch.testing.assert_close(found[1], found[0], atol=3e-2, rtol=0)


@pytest.fixture(params=["rows fit in a block", "rows are longer than a block"])
def blocks(request, monkeypatch):
    """Rows of some hundred numbers are handled as those of real lengths are, in one block or in several."""
    from tieredkv.ops.triton import choose

    if request.param == "rows are longer than a block":
        monkeypatch.setattr(choose, "LARGEST_BLOCK", 256)


@pytest.mark.parametrize("chunks", [7, 256, 700])
def test_the_best_chunks_are_chosen(kernels, device, blocks, chunks):
    ranks = torch.randn(3, chunks)
    slot_of = torch.where(torch.rand(3, chunks + 1) < 0.5, 1, -1).int()
    selected = torch.tensor([0, 3, 7])
    found = []
    for ops, where in ((TORCH, torch.device("cpu")), (kernels, device)):
        chosen = torch.rand(3, chunks, device=where) < 0.5  # of the step before
        order = torch.full((3, chunks), -7, dtype=torch.int32, device=where)
        missed, misses = ops.choose(ranks.to(where), selected.to(where), slot_of.to(where), 7, chosen, order)
        counted = [missed[head, :count].cpu() for head, count in enumerate(misses.tolist())]
        found.append((chosen.cpu(), torch.cat(counted), misses.cpu(), order.cpu()))
        before = chosen.int().cumsum(1) - chosen.int()
        assert torch.equal(order, torch.where(chosen, before, -7).int())
    for want, got in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_all_of_equal_ranks_may_be_chosen_or_few(kernels, device, blocks):
    ranks = torch.tensor([[-1.0] * 300 + [-2.0] * 300, [0.0] * 299 + [-0.5] * 301], device=device)
    none = torch.full((2, 601), -1, dtype=torch.int32, device=device)
    chosen = torch.ones(2, 600, dtype=torch.bool, device=device)
    missed, misses = kernels.choose(ranks, torch.tensor([280, 300], device=device), none, 300, chosen)
    for head, (count, want) in enumerate([(280, range(280)), (300, range(300))]):
        assert chosen[head].nonzero().flatten().tolist() == list(want)
        assert missed[head, :count].tolist() == list(want)
    assert misses.tolist() == [280, 300]


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "ahead"])
def test_the_slots_longest_unused_give_way(kernels, device, blocks, listed):
    """Tables in the middle of an answer: some slots never used, some kept, some a head does not own."""
    n, chunks, count, step = 2, 900, 600, 37
    slots = torch.randperm(n * count).view(n, count).int()
    slots[1, 500:] = -1
    chunk_in = torch.stack([torch.randperm(chunks)[:count] for _ in range(n)]).int()
    chunk_in[:, ::7] = -1
    chunk_in[1, 500:] = -1
    missed = torch.stack([torch.randperm(chunks)[:200] for _ in range(n)]).int()
    order = torch.stack([torch.randperm(chunks) for _ in range(n)]).int()
    last_used = torch.where(torch.rand(n, count) < 0.3, -1 - torch.arange(count), torch.randint(0, step, (n, count)))
    wanted = torch.rand(n, chunks) < 0.2
    kept = wanted | (torch.rand(n, chunks) < 0.2)
    misses, heads = torch.tensor([190, 170], dtype=torch.int32), torch.tensor([2, 0])
    found = []
    for ops, where in ((TORCH, torch.device("cpu")), (kernels, device)):
        table, used = torch.zeros(3, 4 + chunks, dtype=torch.int32, device=where), last_used.int().to(where)
        steps, total = torch.full((n,), step, dtype=torch.int32, device=where), torch.tensor([5, 6], device=where)
        listing = Listing(table, heads.to(where), 4, order.to(where))
        victims = ops.place(
            wanted.to(where), kept.to(where), missed.to(where), misses.to(where), chunk_in.to(where), used,
            slots.to(where), steps, total, listing if listed else None,
        )  # fmt: skip
        assert steps.tolist() == [step + 1 if listed else step] * n
        assert total.tolist() == [5 + 190, 6 + 170]
        assert int((used == steps.unsqueeze(1)).sum()) >= 190 + 170
        parts = torch.cat([victims[0, :190], victims[1, :170]]), used, table
        found.append(tuple(part.cpu() for part in parts))
    for want, got in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_ties_do_not_change_how_many_chunks_are_chosen(kernels, device):
    ranks = torch.tensor([[0.0, 1.0, 0.0, 0.0, 2.0, 0.0]], device=device)
    none = torch.full((1, 7), -1, dtype=torch.int32, device=device)
    for count, want in ((4, [0, 1, 2, 4]), (5, [0, 1, 2, 3, 4])):
        chosen = torch.ones(1, 6, dtype=torch.bool, device=device)
        missed, misses = kernels.choose(ranks, torch.tensor([count], device=device), none, 5, chosen)
        assert chosen[0].nonzero().flatten().tolist() == want
        assert (missed[0, :count].tolist(), misses.tolist()) == (want, [count])


@FROM_HOST
@SIZES
def test_chunks_are_fetched(kernels, device, bits, page_bits, dtype, c, d):
    """With one codec, bit by bit; else they are encoded."""
    source, heads = chunks_of(bits, odd_tokens(dtype, 2, 3, 9 * c, d), c), torch.tensor([2, 0, 2, 1, 0])
    chunks, slots = torch.tensor([0, 0, 3, 1, 4]), torch.tensor([6, 2, 0, 1, 9])
    got = empty_pool(page_bits, 10, 3, c, d, dtype, device)
    want = empty_pool(page_bits, 10, 3, c, d, dtype, torch.device("cpu"))
    kernels.fetch(source.on_host(device), got, heads, chunks, slots.to(device))
    torch_ops.fetch(source, want, heads, chunks, slots)
    if bits == page_bits:
        assert torch.equal(got.records.cpu(), want.records)
    else:
        assert want.codec.fields(want.records)[2][2, 1].isnan()
        assert_encoded_alike(got, want)


@FROM_HOST
@SIZES
def test_tokens_are_kept(kernels, device, bits, page_bits, dtype, c, d):
    source, slots = chunks_of(bits, odd_tokens(dtype, 2, 3, 9 * c, d), c), torch.tensor([3, 5, 8, 1, 0])
    tokens = torch.cat((torch.arange(5), 5 + torch.randperm(9 * c - 5)[:13].sort().values)).clamp(max=9 * c - 1)
    got = empty_pool(page_bits, 10, 3, c, d, dtype, device)
    want = empty_pool(page_bits, 10, 3, c, d, dtype, torch.device("cpu"))
    for head in range(3):
        kernels.keep(source.on_host(device), got, head, tokens, slots.to(device))
        torch_ops.keep(source, want, head, tokens, slots)
        if bits == page_bits:
            assert torch.equal(got.records.cpu(), want.records)
        else:
            assert_encoded_alike(got, want)


@FROM_HOST
@SIZES
def test_missed_chunks_are_gathered(kernels, device, bits, page_bits, dtype, c, d):
    """More misses than one program copies at a time, heads in any order, empty and occupied slots."""
    source, heads = chunks_of(bits, odd_tokens(dtype, 2, 3, 12 * c, d), c), torch.tensor([2, 0])
    missed = torch.tensor([[0, 2, 4, 5, 7, 9], [0, 1, 3, 0, 0, 0]], dtype=torch.int32)
    victims = torch.tensor([[0, 1, 2, 3, 4, 6], [1, 4, 5, 0, 0, 0]], dtype=torch.int32)
    misses = torch.tensor([6, 3], dtype=torch.int32)
    slots = torch.randperm(20)[:14].view(2, 7).int()
    chunk_in, slot_of = torch.full((2, 7), -1, dtype=torch.int32), torch.full((2, 12), -1, dtype=torch.int32)
    chunk_in[0, 1], slot_of[0, 8] = 8, 1
    tables = [part.to(device) for part in (heads, missed, victims, misses, slots)]
    got_tables = [chunk_in.to(device).clone(), slot_of.to(device).clone()]
    got = empty_pool(page_bits, 20, 3, c, d, dtype, device)
    want = empty_pool(page_bits, 20, 3, c, d, dtype, torch.device("cpu"))
    kernels.gather(source.on_host(device), got, *tables, *got_tables, 1)
    torch_ops.gather(source, want, heads, missed, victims, misses, slots, chunk_in, slot_of, 1)
    if bits == page_bits:
        assert torch.equal(got.records.cpu(), want.records)
    else:
        assert_encoded_alike(got, want)
    assert torch.equal(got_tables[0].cpu(), chunk_in)
    assert torch.equal(got_tables[1].cpu(), slot_of)


def test_heads_need_not_be_next_to_each_other(kernels, device):
    """The host tier has room for more chunks than are written."""
    source = chunks_of(4, torch.randn(2, 3, 9 * 8, 64), 8)
    part = Chunks(source.codec, source.on_host(device).records[:, :5])
    got = empty_pool(4, 3, 3, 8, 64, torch.float32, device)
    heads, chunks, slots = torch.tensor([2, 0, 1]), torch.tensor([4, 1, 0]), torch.arange(3, device=device)
    kernels.fetch(part, got, heads, chunks, slots)
    assert torch.equal(got.records.cpu(), source.records[heads, chunks])


@BITS
@DTYPES
@pytest.mark.parametrize("d", [16, 80, 128])
def test_a_token_is_appended(kernels, device, bits, dtype, d):
    table, lengths = torch.tensor([[3, 1, 7], [0, 8, 2]], dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)
    got = empty_pool(bits, 9, 2, 4, d, dtype, device)
    want = empty_pool(bits, 9, 2, 4, d, dtype, torch.device("cpu"))
    got_lengths, count = lengths.to(device).clone(), torch.zeros(2, 2, dtype=torch.int32)
    got_count = count.to(device).clone()
    for place, tokens in enumerate(odd_tokens(dtype, 6, 2, 2, d)):
        new = [part.to(device) for part in tokens.unbind()]
        kernels.append(*new, got, table.to(device), got_lengths, got_count)
        torch_ops.append(*tokens.unbind(), want, table, lengths, count)
        assert got_count.tolist() == count.tolist() == [[place + 1] * 2] * 2
    assert_encoded_alike(got, want)
    assert torch.equal(got_lengths.cpu(), lengths)


@pytest.mark.parametrize("options", [
    {"theta": 2.0}, {"policy": "streaming"}, {"policy": "arkvale"},
    {"reuse_above": -1.0, "prefetch": True}, {"adaptive": True},
    {"host_kv_bits": 16, "pack_pages": False}, {"host_kv_bits": 16}, {"host_kv_bits": 4},
], ids=str)  # fmt: skip
def test_decoding_with_kernels_is_decoding_with_torch(shallow, long_ids, kernels, device, options):
    """Logits of several steps, and what was selected and copied."""
    if device.type != "cpu":
        pytest.skip("interpreted; on a card the whole path is tested")
    llama, ids = shallow, long_ids[:, :240]
    tiers = {**pressed(llama, 240, 0.5), "chunk_tokens": 8, "text_window": 16, "recent_window": 16, **options}

    def decode(ops):
        with (
            torch.no_grad(),
            tieredkv.use_attention(llama),
            # Triton's interpreter runs on one thread only.
            TieredCache(llama.config, **tier_options(**tiers), max_new_tokens=8, ops=ops, copies=LateCopies()) as cache,
        ):
            llama(ids, **cache_argument(cache))
            rows = [llama(ids[:, i : i + 1], **cache_argument(cache)).logits[0, -1] for i in range(2)]
            cache.finish()
            counters = cache.counters
            return torch.stack(rows), (counters.reused, counters.selected, counters.missed_bytes)

    (got, counts), (want, want_counts) = decode(kernels), decode(TORCH)
    assert_near(got, want)
    assert counts == want_counts
    assert (counts[0] > 0) == ("reuse_above" in options)


def test_kernels_are_used_on_cards_only():
    assert ops_for(torch.device("cpu")).name in ("numba", "torch")
    assert ops_for(torch.device("cuda")) is triton()


def test_no_kernel_reads_memory_that_is_not_page_locked():
    without = copying_by_torch(triton())
    assert not without.capturable
    assert (without.gather, without.fetch, without.keep) == (torch_ops.gather, torch_ops.fetch, torch_ops.keep)
    assert without.paged_attention is triton().paged_attention


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("card", [["89"], ["86", "--common"], ["90", "--common"], ["120", "--common"]], ids=" ".join)
def test_every_kernel_compiles_for_a_card(card):
    """In a separate process, where Triton compiles: within the shared memory of RTX 30, 40, 50 and H100, and hardly
    spilling registers in common shapes."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run([sys.executable, str(script), *card], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert compiled >= {"_attend_split", "_turn_queries", "_append", "_choose", "_place", "_gather", "_keep"}
