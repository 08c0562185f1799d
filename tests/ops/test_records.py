"""The operations of a decoding step on records of every codec, in torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tieredkv.codecs import CODECS, PLAIN, codec_for
from tieredkv.codecs.base import AT_ONCE, Codec, Fit
from tieredkv.ops import torch_ops
from tieredkv.ops.base import Pages

HEADS, CHUNKS, C, D = 2, 12, 4, 16
BITS = pytest.mark.parametrize("bits", sorted(CODECS))


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass
class Host:
    """A source that is in memory, or only fetched."""

    codec: Codec
    all: torch.Tensor
    fit: Fit | None
    in_memory: bool = True

    @property
    def records(self) -> torch.Tensor | None:
        return self.all if self.in_memory else None

    def fetch(self, heads: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
        return self.all[heads, chunks]


def host_of(bits: int, keys: torch.Tensor, values: torch.Tensor, in_memory: bool = True) -> Host:
    """Records of tokens `(K, n, D)` in whole chunks, as a host tier writes them."""
    codec = codec_for(bits, C, keys.shape[-1], keys.dtype)
    fit = codec.fit(keys, values)
    records = torch.zeros((len(keys), keys.shape[1] // C, codec.chunk_bytes), dtype=torch.uint8)
    for field, stored in zip(codec.fields(records), codec.encode(keys, values, fit), strict=True):
        field.copy_(stored.unflatten(1, (-1, C)))
    return Host(codec, records, fit, in_memory)


def host(bits: int, in_memory: bool = True, heads: int = HEADS) -> Host:
    return host_of(bits, rows(heads, CHUNKS * C, D), rows(heads, CHUNKS * C, D, seed=1), in_memory)


def pool_for(source: Host, slots: int, bits: int | None = None) -> Pages:
    """An empty pool of the source's codec, or of another."""
    codec, fit = source.codec, source.fit
    if bits is not None and bits != codec.bits:
        codec = codec_for(bits, C, codec.head_dim, codec.dtype)
        fit = codec.fit(*decoded(source.codec, source.all, source.fit))
    return Pages(codec, torch.zeros((slots, codec.chunk_bytes), dtype=torch.uint8), fit)


def decoded(codec: Codec, records: torch.Tensor, fit: Fit | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `(K, m * C, D)` float32 of records `(K, m, B)`."""
    return codec.decode(tuple(field.flatten(1, 2) for field in codec.fields(records)), fit)


def attention(query, keys, values, seen, scaling):
    """Output, lse and logits in float64. seen: `(K, m)` mask."""
    group = len(query) // len(keys)
    keys, values, seen = (part.repeat_interleave(group, 0) for part in (keys.double(), values.double(), seen))
    logits = (query.double() @ keys.mT * scaling).masked_fill(~seen.unsqueeze(1), -1e300)
    return logits.softmax(-1) @ values, logits.logsumexp(-1), logits


# ---- copies


@pytest.mark.parametrize("in_memory", [True, False])
@BITS
def test_chunks_are_copied_as_they_are(bits, in_memory):
    source = host(bits, in_memory)
    pages = pool_for(source, 9)
    heads, chunks, slots = torch.tensor([1, 0, 1]), torch.tensor([3, 11, 0]), torch.tensor([2, 8, 5])
    torch_ops.fetch(source, pages, heads, chunks, slots)
    assert torch.equal(pages.records[slots], source.all[heads, chunks])
    assert not pages.records[[0, 1, 3, 4, 6, 7]].any()


@pytest.mark.parametrize("at_once", [1, 10, 2**20])
def test_many_chunks_are_copied_in_parts(monkeypatch, at_once):
    monkeypatch.setattr(torch_ops, "COPIED", at_once * 10)
    source = host(8)
    pages = pool_for(source, HEADS * CHUNKS)
    heads, chunks = torch.arange(HEADS).repeat_interleave(CHUNKS), torch.arange(CHUNKS).repeat(HEADS)
    torch_ops.fetch(source, pages, heads, chunks, torch.arange(HEADS * CHUNKS))
    assert torch.equal(pages.records, source.all.flatten(0, 1))


@pytest.mark.parametrize("in_memory", [True, False])
def test_chunks_of_a_plain_host_are_encoded_as_they_are_fetched(in_memory):
    keys, values = rows(1, AT_ONCE + 5 * C, D), rows(1, AT_ONCE + 5 * C, D, seed=1)
    source, packed = host_of(PLAIN, keys, values, in_memory), host_of(8, keys, values)
    pages, count = pool_for(packed, AT_ONCE // C + 5), AT_ONCE // C + 5
    torch_ops.fetch(source, pages, torch.zeros(count).long(), torch.arange(count), torch.arange(count).int())
    assert torch.equal(pages.records, packed.all[0])


@BITS
def test_fetching_nothing_copies_nothing(bits):
    source, none = host(bits), torch.zeros(0).long()
    pages = pool_for(source, 3)
    torch_ops.fetch(source, pages, none, none, none)
    torch_ops.keep(source, pages, 0, none, none)
    assert not pages.records.any()


@pytest.mark.parametrize("in_memory", [True, False])
@BITS
def test_missed_chunks_enter_their_victims_slots(bits, in_memory):
    source = host(bits, in_memory)
    pages = pool_for(source, 8)
    heads, slots = torch.tensor([1, 0]), torch.tensor([[0, 1, 2], [5, 6, 7]])
    missed, victims = torch.tensor([[4, 7], [2, 0]]).int(), torch.tensor([[0, 2], [1, 0]]).int()
    chunk_in, slot_of = torch.full((2, 3), -1).int(), torch.full((2, CHUNKS + 1), -1).int()
    torch_ops.gather(
        source, pages, heads, missed, victims, torch.tensor([2, 1]).int(), slots, chunk_in, slot_of, first_chunk=1
    )
    for slot, head, chunk in ((0, 1, 4), (2, 1, 7), (6, 0, 2)):
        assert torch.equal(pages.records[slot], source.all[head, 1 + chunk])
    assert chunk_in.tolist() == [[4, -1, 7], [-1, 2, -1]]
    assert slot_of[0, [4, 7]].tolist() == [0, 2]
    assert int(slot_of[1, 2]) == 1


@pytest.mark.parametrize("in_memory", [True, False])
@BITS
def test_kept_tokens_are_the_same_bytes(bits, in_memory):
    source = host(bits, in_memory)
    pages, tokens, slots = pool_for(source, 6), torch.tensor([1, 2, 17, 40, 41, 3]), torch.tensor([4, 2])
    torch_ops.keep(source, pages, 1, tokens, slots)
    for kept, stored in zip(pages.codec.fields(pages.records[slots]), source.codec.fields(source.all[1]), strict=True):
        assert torch.equal(kept.flatten(0, 1)[:6], stored.flatten(0, 1)[tokens])


def test_more_tokens_than_are_read_at_a_time_are_kept(monkeypatch):
    source = host(4)
    pages, tokens = pool_for(source, CHUNKS), torch.randperm(CHUNKS * C)
    monkeypatch.setattr(torch_ops, "AT_ONCE", 7)
    torch_ops.keep(source, pages, 0, tokens, torch.arange(CHUNKS))
    for kept, stored in zip(source.codec.fields(pages.records), source.codec.fields(source.all[0]), strict=True):
        assert torch.equal(kept.flatten(0, 1), stored.flatten(0, 1)[tokens])


def test_tokens_of_a_plain_host_are_encoded_as_they_are_kept():
    keys, values = rows(HEADS, CHUNKS * C, D), rows(HEADS, CHUNKS * C, D, seed=1)
    source, packed = host_of(PLAIN, keys, values), host_of(8, keys, values)
    pages, wanted, slots = pool_for(packed, 3), pool_for(packed, 3), torch.tensor([2, 0])
    tokens = torch.tensor([9, 30, 31, 2, 44])
    torch_ops.keep(source, pages, 1, tokens, slots)
    torch_ops.keep(packed, wanted, 1, tokens, slots)
    assert torch.equal(pages.records, wanted.records)


@BITS
def test_written_tokens_are_what_a_host_stores(bits):
    source = host(bits)
    keys, values = rows(HEADS, CHUNKS * C, D), rows(HEADS, CHUNKS * C, D, seed=1)
    pages, slots = pool_for(source, CHUNKS), torch.randperm(CHUNKS)
    torch_ops.write(keys[1], values[1], pages, 1, slots)
    assert torch.equal(pages.records[slots], source.all[1])


@BITS
def test_appended_tokens_are_what_a_host_stores(bits):
    source = host(bits)
    keys, values = rows(HEADS, CHUNKS * C, D), rows(HEADS, CHUNKS * C, D, seed=1)
    pages, table = pool_for(source, HEADS * CHUNKS), torch.randperm(HEADS * CHUNKS).view(HEADS, CHUNKS).int()
    lengths = torch.zeros_like(table)
    count = torch.zeros(HEADS, 2).int()
    for token in range(10):
        torch_ops.append(keys[:, token], values[:, token], pages, table, lengths, count)
    whole = table[:, :2].long()
    assert torch.equal(pages.records[whole], source.all[:, :2])
    assert lengths[:, :4].tolist() == [[4, 4, 2, 0]] * HEADS


# ---- attention


@pytest.mark.parametrize(("group", "queries"), [(1, 1), (3, 1), (2, 5)])
@BITS
def test_attention_over_pages_is_attention_over_what_they_decode_to(bits, group, queries):
    source, columns = host(bits), 9
    pages = Pages(source.codec, source.all.flatten(0, 1), source.fit)
    table = torch.stack([CHUNKS * head + torch.randperm(CHUNKS)[:columns] for head in range(HEADS)]).int()
    lengths = torch.tensor([[4, 1, 0, 4, 4, 3, 4, 2, 0], [0, 0, 0, 4, 4, 4, 4, 4, 4]]).int()
    query = rows(HEADS * group, queries, D, seed=3, dtype=torch.float32)
    keys, values = decoded(source.codec, pages.records[table.long()], source.fit)
    seen = torch.arange(C).expand(HEADS, columns, C) < lengths.unsqueeze(-1)
    want, lse, _ = attention(query, keys, values, seen.flatten(1), 0.3)
    for batch_pages in (1, 5, 8, 100):
        got = torch_ops.paged_attention(query, pages, table, lengths, 0.3, batch_pages)
        torch.testing.assert_close(got, (want.float(), lse.float()), rtol=1e-4, atol=1e-5)


@BITS
@pytest.mark.parametrize("batch_pages", [1, 8, 100])
def test_the_lse_of_each_page_adds_up_to_that_of_all(bits, batch_pages):
    source, columns = host(bits), 9
    pages = Pages(source.codec, source.all.flatten(0, 1), source.fit)
    table = torch.stack([CHUNKS * head + torch.randperm(CHUNKS)[:columns] for head in range(HEADS)]).int()
    lengths = torch.tensor([[4, 1, 0, 4, 4, 3, 4, 2, 0], [0, 0, 0, 4, 4, 4, 4, 4, 4]]).int()
    query, page_lse = rows(HEADS * 2, 1, D, seed=3, dtype=torch.float32), torch.full((HEADS * 2, columns + 2), 7.0)
    _, lse = torch_ops.paged_attention(query, pages, table, lengths, 0.3, batch_pages, page_lse)
    keys, values = decoded(source.codec, pages.records[table.long()], source.fit)
    seen = torch.arange(C).expand(HEADS, columns, C) < lengths.unsqueeze(-1)
    _, _, logits = attention(query, keys, values, seen.flatten(1), 0.3)
    want = logits.view(HEADS * 2, columns, C).logsumexp(-1).float()
    absent = (lengths == 0).repeat_interleave(2, 0)
    torch.testing.assert_close(page_lse[:, :columns][~absent], want[~absent], rtol=1e-4, atol=1e-5)
    assert (page_lse[:, :columns][absent] < -1e30).all()
    assert (page_lse[:, columns:] == 7).all()
    torch.testing.assert_close(page_lse[:, :columns].logsumexp(-1, keepdim=True), lse)


@BITS
def test_the_lse_counts_what_all_keys_share(bits):
    """Merging with other attention, the mass that was not seen and evidence compare it with other log-sum-exps."""
    keys, values = rows(HEADS, CHUNKS * C, D) + 40, rows(HEADS, CHUNKS * C, D, seed=1)
    source = host_of(bits, keys, values)
    pages = Pages(source.codec, source.all.flatten(0, 1), source.fit)
    table, lengths = torch.arange(HEADS * CHUNKS).view(HEADS, -1).int(), torch.full((HEADS, CHUNKS), C).int()
    query, page_lse = rows(HEADS, 1, D, seed=3, dtype=torch.float32), torch.zeros(HEADS, CHUNKS)
    _, lse = torch_ops.paged_attention(query, pages, table, lengths, 0.3, 8, page_lse)
    _, want, logits = attention(query, keys, values, torch.ones(HEADS, CHUNKS * C).bool(), 0.3)
    assert (want.abs() > 30).any(), "the shared part would not be seen to be missing"
    assert (lse - want).abs().max() < 0.5
    assert (page_lse - logits.view(HEADS, CHUNKS, C).logsumexp(-1)).abs().max() < 0.8


@BITS
def test_the_order_of_pages_does_not_matter(bits):
    source = host(bits, heads=1)
    pages, query = Pages(source.codec, source.all[0], source.fit), rows(2, 1, D, dtype=torch.float32)
    table, lengths = torch.tensor([[0, 3, 5]]).int(), torch.tensor([[4, 2, 3]]).int()
    forward = torch_ops.paged_attention(query, pages, table, lengths, 0.3, 2)
    torch.testing.assert_close(torch_ops.paged_attention(query, pages, table.flip(1), lengths.flip(1), 0.3, 2), forward)


@BITS
def test_what_lies_beyond_a_pages_length_is_not_attended_to(bits):
    source = host(bits, heads=1)
    pages, query = Pages(source.codec, source.all[0], source.fit), rows(2, 1, D, dtype=torch.float32)
    table, lengths = torch.tensor([[0, 1]]).int(), torch.tensor([[4, 2]]).int()
    want = torch_ops.paged_attention(query, pages, table, lengths, 0.3, 8)
    for field in source.codec.fields(pages.records):
        field[1, 2:] = 3
    torch.testing.assert_close(torch_ops.paged_attention(query, pages, table, lengths, 0.3, 8), want)


@BITS
def test_a_head_without_a_token_is_refused(bits):
    source = host(bits)
    pages = Pages(source.codec, source.all.flatten(0, 1), source.fit)
    query, table = rows(HEADS, 1, D, dtype=torch.float32), torch.zeros(HEADS, 3).int()
    with pytest.raises(ValueError, match="no page to attend to"):
        torch_ops.paged_attention(query, pages, table, torch.tensor([[4, 4, 4], [0, 0, 0]]).int(), 0.3, 4)


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BITS
def test_attention_takes_no_more_scratch_than_it_states(bits, dtype, queries):
    heads, chunks, d, group = 4, 64, 64, 4
    source = host_of(bits, rows(heads, chunks * C, d, dtype=dtype), rows(heads, chunks * C, d, seed=1, dtype=dtype))
    pages = Pages(source.codec, source.all.flatten(0, 1), source.fit)
    table, lengths = torch.arange(heads * chunks).view(heads, -1).int(), torch.full((heads, chunks), C).int()
    query = rows(heads * group, queries, d, dtype=torch.float32)
    page_lse = torch.zeros(heads * group, chunks) if queries == 1 else None
    few = 2 * query.nbytes * 4  # of queries and outputs, whose size does not depend on pages
    for batch_pages in (heads * 8, heads * chunks):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            torch_ops.paged_attention(query, pages, table, lengths, 0.3, batch_pages, page_lse)
        live = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        counted = batch_pages * torch_ops.scratch_bytes(source.codec, group)
        assert peak <= counted + few
        assert queries > 1 or counted < 1.7 * peak
