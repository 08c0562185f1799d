"""Host layers in 16, 8 and 4 bits: what is read back is what the codec makes of each token, however it was written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tieredkv.codecs import CODECS, codec_for
from tieredkv.codecs.base import FIT_TOKENS
from tieredkv.memory.arena import MemoryArena
from tieredkv.memory.host import HostLayer
from tieredkv.memory.units import ceil_div

K, D, C = 2, 8, 4
PACKED = sorted(bits for bits in CODECS if bits != 16)
TOKENS = torch.randn((2, K, 900, D), generator=torch.Generator().manual_seed(1)).bfloat16()


class Unmapped(MemoryArena):
    """An arena whose records only `read` and `fetch` return, as if they were on disk."""

    @property
    def records(self):
        return None


def layer(new_arena=MemoryArena) -> HostLayer:
    return HostLayer(K, D, C, torch.bfloat16, new_arena)


def filled(bits: int, first: int, tokens: int, new_arena=MemoryArena) -> HostLayer:
    """A layer of `tokens` tokens that was packed after the `first` ones."""
    host = layer(new_arena)
    host.append(*TOKENS[:, :, :first])
    if bits != 16:
        host.pack(codec_for(bits, C, D, torch.bfloat16))
    host.append(*TOKENS[:, :, first:tokens])
    return host


def expected(host: HostLayer, tokens: int) -> tuple[torch.Tensor, ...]:
    """What the layer's codec makes of the first tokens."""
    keys, values = TOKENS[:, :, :tokens]
    return tuple(part.bfloat16() for part in host.codec.decode(host.codec.encode(keys, values, host.fit), host.fit))


@pytest.mark.parametrize("new_arena", [MemoryArena, Unmapped])
@pytest.mark.parametrize("bits", sorted(CODECS))
@given(st.integers(1, 40), st.lists(st.integers(1, 300), max_size=3), st.data())
@settings(max_examples=15, deadline=None)
def test_tokens_are_read_back_as_the_codec_has_them(bits, new_arena, first, sizes, data):
    host = filled(bits, first, first, new_arena)
    for size in sizes:
        size = min(size, 900 - host.length)
        host.append(*TOKENS[:, :, host.length : host.length + size])
    n = host.length
    keys, values = expected(host, n)
    torch.testing.assert_close(host.decoded(0, n), (keys, values), rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(host.keys().flatten(1, 2)[:, :n], keys, rtol=2**-7, atol=1e-2)
    begin = data.draw(st.integers(0, n - 1))
    part = host.decoded(begin, n)
    assert torch.equal(part[0], host.decoded(0, n)[0][:, begin:])
    index = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9)))
    torch.testing.assert_close(host.tokens(1, index), (keys[1, index], values[1, index]), rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("bits", PACKED)
def test_the_codec_is_fitted_to_the_first_tokens_alone(bits):
    keys = torch.cat((torch.randn(K, FIT_TOKENS, D), torch.full((K, 500, D), 99.0)), dim=1)
    short, long = HostLayer(K, D, C, torch.float32), HostLayer(K, D, C, torch.float32)
    short.append(keys[:, :FIT_TOKENS], keys[:, :FIT_TOKENS])
    long.append(keys, keys)
    for host in (short, long):
        host.pack(codec_for(bits, C, D, torch.float32))
    assert torch.equal(short.fit.centre, long.fit.centre)
    assert torch.equal(short.fit.channels, long.fit.channels)


@pytest.mark.parametrize("bits", PACKED)
def test_packing_keeps_one_arena_of_the_size_asked_for(bits):
    arenas = []

    def new_arena(heads, chunk_bytes):
        arenas.append(MemoryArena(heads, chunk_bytes))
        return arenas[-1]

    host = layer(new_arena)
    host.append(*TOKENS[:, :, :100])
    host.pack(codec_for(bits, C, D, torch.bfloat16), room=402)
    assert [arena.nbytes for arena in arenas] == [0, host.nbytes]
    assert host.nbytes == K * ceil_div(402, C) * host.codec.chunk_bytes
    assert (host.capacity, host.length) == (404, 100)


class Full(Unmapped):
    """An arena that has no room for packed records beyond the first 300 tokens."""

    def write(self, first, records):
        if records.shape[2] < 2 * C * D * 2 and first * C >= 300:
            raise OSError("full")
        super().write(first, records)


def test_a_layer_that_cannot_be_packed_stays_as_it_was():
    host = layer(Full)
    host.append(*TOKENS)
    with pytest.raises(OSError, match="full"):
        host.pack(codec_for(8, C, D, torch.bfloat16))
    assert (host.length, host.codec.bits, host.fit) == (900, 16, None)
    assert torch.equal(host.decoded(0, 900)[0], TOKENS[0])


def test_a_layer_is_packed_only_once():
    host = filled(8, 50, 60)
    with pytest.raises(ValueError, match="stored in 8 bits already"):
        host.pack(codec_for(4, C, D, torch.bfloat16))


@pytest.mark.parametrize("bits", sorted(CODECS))
@pytest.mark.parametrize("begin", [0, 16, 21])
def test_tokens_as_stored_can_be_cut_off_and_put_back(bits, begin):
    host = filled(bits, 50, 90)
    before, part = host.decoded(0, 90), host.stored(begin, 90)
    assert sum(field.nbytes for field in part) == (90 - begin) * host.token_bytes
    host.truncate(begin)
    host.append(*TOKENS[:, :, 300:350])
    host.truncate(begin)
    host.append_stored(part)
    assert torch.equal(host.decoded(0, 90)[0], before[0])
    assert torch.equal(host.decoded(0, 90)[1], before[1])


@pytest.mark.parametrize("bits", PACKED)
def test_what_was_decoded_in_float32_is_stored_again_as_it_was(bits):
    """As generated tokens are, which come from pages of the same codec."""
    host = filled(bits, 50, 90)
    fields = host.stored(60, 90)
    again = host.codec.encode(*host.codec.decode(fields, host.fit), host.fit)
    for was, now in zip(fields, again, strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("with_values", [True, False])
@pytest.mark.parametrize("bits", PACKED)
def test_staged_records_are_decoded_elsewhere(bits, with_values):
    host = filled(bits, 50, 88)
    staged = torch.zeros((K, 22, host.codec.chunk_bytes), dtype=torch.uint8)
    moved = host.stage(0, 22, staged, with_values)
    assert moved == staged.nbytes // (1 if with_values else 2)
    assert torch.equal(host.keys_of(staged), host.keys())
    both = torch.empty((2, K, 22, C, D))
    host.codec.decode_to(both[0], both[1], host.chunks(), host.fit)
    values = torch.empty_like(both[0])
    host.codec.decode_to(torch.empty_like(values), values, staged, host.fit)
    assert torch.equal(values, both[1]) == with_values


@pytest.mark.parametrize("bits", sorted(CODECS))
def test_a_stored_layer_is_adopted_with_its_codec(bits):
    host = filled(bits, 50, 90)
    records = host.arena_to_store(10)
    assert records.shape[1] == 25
    assert not records[:, 23:].any()
    other = layer()
    other.adopt(MemoryArena.of(records), 90, host.codec, host.fit)
    assert torch.equal(other.decoded(0, 90)[1], host.decoded(0, 90)[1])
    other.append(*TOKENS[:, :, 90:120])
    again = filled(bits, 50, 120)
    assert torch.equal(other.decoded(0, 120)[0], again.decoded(0, 120)[0])


def test_records_of_another_codec_are_not_adopted():
    with pytest.raises(ValueError, match="do not fit this layer"):
        layer().adopt(MemoryArena.of(filled(8, 50, 90).arena_to_store(0)), 90, codec_for(4, C, D, torch.bfloat16), None)


def test_a_cleared_layer_is_as_new():
    host = filled(4, 50, 90)
    host.clear()
    assert (host.length, host.nbytes, host.fit, host.codec.bits) == (0, 0, None, 16)
    host.append(*TOKENS[:, :, :30])
    assert torch.equal(host.decoded(0, 30)[0], TOKENS[0, :, :30])
