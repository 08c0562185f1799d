"""Records copied and written by Triton's kernels, against torch."""

from __future__ import annotations

import pytest
import torch
from kernel_examples import (
    BITS,
    DTYPES,
    FROM_HOST,
    SIZES,
    Chunks,
    assert_encoded_alike,
    chunks_of,
    empty_pool,
    odd_tokens,
)

from tieredkv.ops import torch_ops

pytestmark = pytest.mark.interpreter


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
