"""Every codec keeps the contract of `codecs.base`."""

from __future__ import annotations

import pytest
import torch
from codec_examples import HEADS, decoded, layer, records_of, rows, write
from torch._subclasses.fake_tensor import FakeTensorMode

from tieredkv.codecs import CODECS, PLAIN, codec_for
from tieredkv.codecs.base import FIT_TOKENS, Codec, Fit, tokens_of
from tieredkv.codecs.rotated import hadamard
from tieredkv.memory.units import HOST_BITS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY = pytest.mark.parametrize("bits", CODECS)
"""The codecs, each of a typical size."""
SIZES = pytest.mark.parametrize("size", [16, 64, 80, 96, 128])
CENTRES = pytest.mark.parametrize("centre", [0, 100])


def codec_of(bits: int, size: int = 64, dtype: torch.dtype = torch.float32, chunk_tokens: int = 8) -> Codec:
    return codec_for(bits, chunk_tokens, size, dtype)


def norm(tensor: torch.Tensor) -> float:
    return float(tensor.double().norm())


# ---- records


@EVERY
@SIZES
@pytest.mark.parametrize("chunk_tokens", [1, 2, 8, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fields_cover_the_record_but_what_rounds_it_up(bits, size, chunk_tokens, dtype):
    codec = codec_of(bits, size, dtype, chunk_tokens)
    records = torch.zeros((HEADS, 3, codec.chunk_bytes), dtype=torch.uint8)
    fields = codec.fields(records)
    for field in fields:
        assert field.shape[:-1] == (HEADS, 3, chunk_tokens)
        assert field.stride(-1) == 1
        assert field.untyped_storage().data_ptr() == records.untyped_storage().data_ptr()
        before = records.count_nonzero()
        field.view(torch.uint8).fill_(1)
        assert records.count_nonzero() - before == field.numel() * field.element_size(), "fields overlap"
    left = codec.chunk_bytes - int(records[0, 0].count_nonzero())
    assert 0 <= left < 4
    assert left == 0 or chunk_tokens == 1
    assert codec.chunk_bytes % 4 == 0


@EVERY
def test_fields_are_found_in_any_view_of_records(bits):
    codec = codec_of(bits)
    records = torch.randint(0, 255, (HEADS, 5, codec.chunk_bytes), dtype=torch.uint8)
    for place in (slice(1, 4), slice(0, 5, 2)):
        for some, all_fields in zip(codec.fields(records[:, place]), codec.fields(records), strict=True):
            assert torch.equal(some.contiguous().view(torch.uint8), all_fields[:, place].contiguous().view(torch.uint8))
    for one, all_fields in zip(codec.fields(records[1, 2]), codec.fields(records), strict=True):
        assert torch.equal(one.contiguous().view(torch.uint8), all_fields[1, 2].contiguous().view(torch.uint8))


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_encoded_has_the_shapes_and_dtypes_of_the_fields(bits, dtype):
    codec = codec_of(bits, dtype=dtype)
    keys, values = layer(13, 64, dtype)
    fields = codec.fields(torch.zeros((HEADS, 1, codec.chunk_bytes), dtype=torch.uint8))
    got = codec.encode(keys, values, codec.fit(keys, values))
    assert [(part.dtype, *part.shape) for part in got] == [(f.dtype, HEADS, 13, f.shape[-1]) for f in fields]


@EVERY
@pytest.mark.parametrize("steps", [[1] * 21, [3, 1, 8, 9], [16, 5]], ids=["single", "mixed", "whole"])
def test_tokens_written_a_few_at_a_time_equal_whole_chunks(bits, steps):
    codec = codec_of(bits)
    keys, values = layer(21, 64)
    fit = codec.fit(keys, values)
    whole = records_of(codec, keys, values, fit)
    pieces = torch.zeros_like(whole)
    first = 0
    for n in steps:
        some = slice(first, first + n)
        write(codec, pieces, first, codec.encode(keys[:, some], values[:, some], fit))
        first += n
    assert torch.equal(pieces, whole)


@EVERY
def test_a_record_of_one_head_is_that_of_all_heads(bits):
    codec = codec_of(bits)
    keys, values = layer(16, 64)
    fit = codec.fit(keys, values)
    heads = torch.tensor([1])
    alone = records_of(codec, keys[heads], values[heads], fit and fit.of_heads(heads))
    assert torch.equal(alone, records_of(codec, keys, values, fit)[heads])


@EVERY
def test_tokens_of_chunks_follow_one_another(bits):
    codec = codec_of(bits)
    keys, values = layer(16, 64)
    fit = codec.fit(keys, values)
    stored = tokens_of(codec.fields(records_of(codec, keys, values, fit)))
    for got, want in zip(stored, codec.encode(keys, values, fit), strict=True):
        assert torch.equal(got, want)


# ---- precision


ERRORS = {16: 0, 8: 0.008, 4: 0.14}
"""Relative, at most. Half a step is 1 / 254 or 1 / 14 of a token's largest number, about three times its root mean
square, and errors are spread evenly, so theirs is 1 / sqrt(3) of half a step."""


@EVERY
@SIZES
@CENTRES
@pytest.mark.parametrize("n", [1, 9, 300])
def test_keys_and_values_are_decoded_as_precisely_as_the_bits_allow(bits, size, centre, n):
    codec = codec_of(bits, size)
    keys, values = layer(n, size, centre=centre)
    fit = codec.fit(keys, values)
    for got, want in zip(codec.decode(codec.encode(keys, values, fit), fit), (keys, values), strict=True):
        assert got.dtype == torch.float32
        assert norm(got - want) <= ERRORS[bits] * norm(want)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype_of_a_model_is_encoded_as_its_numbers_are(bits, dtype):
    keys, values = layer(40, 64, dtype)
    codec, exact = codec_of(bits, dtype=dtype), codec_of(bits)
    fit = codec.fit(keys, values)
    got = codec.decode(codec.encode(keys, values, fit), fit)
    want = exact.decode(exact.encode(keys.float(), values.float(), fit), fit)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_records_are_the_keys_then_the_values(dtype):
    keys, values = layer(16, 64, dtype)
    records = records_of(codec_of(PLAIN, dtype=dtype), keys, values, None)
    both = torch.stack([keys.unflatten(1, (2, 8)), values.unflatten(1, (2, 8))], dim=2)
    assert torch.equal(records.view(dtype), both.flatten(2))


@EVERY
def test_zeros_stay_zeros(bits):
    codec = codec_of(bits)
    keys, values = torch.zeros((2, HEADS, 9, 64))
    fit = codec.fit(keys, values)
    for got in codec.decode(codec.encode(keys, values, fit), fit):
        assert not got.any()


@EVERY
@pytest.mark.parametrize("size", [1e-30, 1e-9, 3e-8, 1e-7, 2e-7, 1e-6])
def test_numbers_too_small_for_a_scale_are_decoded_to_nothing_larger(bits, size):
    codec = codec_of(bits)
    fit = codec.fit(*torch.zeros((2, HEADS, 1, 64)))
    keys, values = (size * part for part in layer(200, 64))
    for got, want in zip(codec.decode(codec.encode(keys, values, fit), fit), (keys, values), strict=True):
        assert ((got - want).norm(dim=-1) <= 1.001 * want.norm(dim=-1)).all()


@EVERY
@CENTRES
def test_encoding_what_was_decoded_gives_the_same_bytes(bits, centre):
    codec = codec_of(bits)
    keys, values = layer(300, 64, centre=centre)
    fit = codec.fit(keys, values)
    once = records_of(codec, keys, values, fit)
    again = records_of(codec, *(part[:, :300] for part in decoded(codec, once, fit)), fit)
    assert torch.equal(again, once)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_encoding_what_was_decoded_and_rounded_to_the_models_dtype_loses_no_more_than_that(bits, dtype):
    """Not the same bytes: a scale may be rounded to the next one, and a number that was between two to the other."""
    codec = codec_of(bits, dtype=dtype)
    keys, values = layer(300, 64, dtype)
    fit = codec.fit(keys, values)
    once = codec.decode(codec.encode(keys, values, fit), fit)
    again = codec.decode(codec.encode(*(part.to(dtype) for part in once), fit), fit)
    for first, second in zip(once, again, strict=True):
        assert norm(second - first) <= 2 * max(norm(first - first.to(dtype)), torch.finfo(dtype).eps * norm(first))


@EVERY
def test_keys_alone_are_decoded_from_their_own_fields(bits):
    codec = codec_of(bits)
    keys, values = layer(24, 64, centre=3)
    fit = codec.fit(keys, values)
    fields = codec.encode(keys, values, fit)
    want = codec.decode(fields, fit)[0]
    for number, field in enumerate(fields):
        if number % 2:
            field.zero_()
    assert torch.equal(codec.decode_keys(fields, fit), want)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_tokens", [8, 512])
def test_records_are_decoded_into_buffers_as_elsewhere(bits, dtype, chunk_tokens):
    """Some hundred tokens at a time, and more of them than that."""
    codec = codec_of(bits, 16, dtype, chunk_tokens)
    keys, values = layer(2048, 16, dtype)
    fit = codec.fit(keys, values)
    records = records_of(codec, keys, values, fit)
    both = torch.full((2, HEADS, 2048 // chunk_tokens, chunk_tokens, 16), torch.nan, dtype=dtype)
    alone = both[0].clone()
    codec.decode_to(both[0], both[1], records, fit)
    codec.decode_to(alone, None, records, fit)
    for got, want in zip(both, decoded(codec, records, fit), strict=True):
        assert torch.equal(got.flatten(1, 2), want.to(dtype))
    assert torch.equal(alone, both[0])


# ---- numbers that are not finite


@EVERY
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_number_that_is_not_finite_is_decoded_to_one_that_is_not(bits, broken, dtype):
    codec = codec_of(bits, dtype=dtype)
    keys, values = layer(9, 64, dtype)
    fit = codec.fit(keys, values)
    keys[1, 3, 2] = values[0, 5, 63] = broken
    got_keys, got_values = codec.decode(codec.encode(keys, values, fit), fit)
    assert not got_keys[1, 3, 2].isfinite()
    assert not got_values[0, 5, 63].isfinite()
    others = torch.ones((HEADS, 9), dtype=torch.bool)
    others[1, 3] = False
    assert got_keys[others].isfinite().all()


@EVERY
@pytest.mark.parametrize("large", [1e3, 1e5, 1e7, 1e9, 1e30])
def test_a_number_too_large_for_a_scale_is_never_decoded_to_a_smaller_one(bits, large):
    codec = codec_of(bits)
    keys, values = layer(9, 64)
    fit = codec.fit(keys, values)
    keys[1, 3, 2] = large
    got = codec.decode(codec.encode(keys, values, fit), fit)[0][1, 3, 2]
    assert not got.isfinite() or abs(float(got) - large) <= 0.2 * large


@EVERY
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_attention_to_a_key_or_value_that_is_not_finite_is_not_finite(bits, broken):
    codec = codec_of(bits)
    keys, values = layer(16, 64)
    fit = codec.fit(keys, values)
    keys[1, 3, 2] = values[0, 5, 7] = broken
    records = records_of(codec, keys, values, fit)
    logits = codec.logits(codec.turned(rows(HEADS, 4, 64), fit), records)
    assert not logits[1, :, 3].isfinite().any()
    assert logits[0].isfinite().all()
    out = codec.finished(codec.mixed(torch.full((HEADS, 4, 16), 1 / 16), records), fit)
    assert not out[0, :, 7].isfinite().any()
    assert out[1].isfinite().all()


# ---- attention


def attention(codec: Codec, query: torch.Tensor, records: torch.Tensor, fit: Fit | None, n: int) -> torch.Tensor:
    """Output `(K, r, D)` of queries that attend to the first `n` tokens of records."""
    logits = codec.logits(codec.turned(query, fit), records)
    constant = codec.constant(query, fit)
    if constant is not None:
        logits = logits + constant.unsqueeze(-1)
    logits[..., n:] = -torch.inf
    return codec.finished(codec.mixed(logits.softmax(-1), records), fit)


@EVERY
@SIZES
@CENTRES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 21])
def test_attention_to_records_is_attention_to_what_they_decode_to(bits, size, centre, dtype, n):
    codec = codec_of(bits, size, dtype)
    keys, values = layer(n, size, dtype, centre)
    fit = codec.fit(keys, values)
    records = records_of(codec, keys, values, fit)
    query = rows(HEADS, 7, size, seed=5) / size**0.5
    kept, mixed = (part[:, :n] for part in decoded(codec, records, fit))
    want = (query @ kept.mT).softmax(-1) @ mixed
    tolerance = {"rtol": 0, "atol": 1e-4 * max(1, float(want.abs().max()))}
    torch.testing.assert_close(attention(codec, query, records, fit, n), want, **tolerance)


@EVERY
@CENTRES
def test_logits_and_their_constant_are_the_products(bits, centre):
    codec = codec_of(bits)
    keys, values = layer(24, 64, centre=centre)
    fit = codec.fit(keys, values)
    records = records_of(codec, keys, values, fit)
    query = rows(HEADS, 7, 64, seed=5)
    got, constant = codec.logits(codec.turned(query, fit), records), codec.constant(query, fit)
    want = query @ decoded(codec, records, fit)[0].mT
    got = got if constant is None else got + constant.unsqueeze(-1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1, float(want.abs().max())))


@EVERY
@CENTRES
def test_outputs_of_parts_may_be_merged_before_they_are_finished(bits, centre):
    codec = codec_of(bits)
    keys, values = layer(32, 64, centre=centre)
    fit = codec.fit(keys, values)
    records = records_of(codec, keys, values, fit)
    weights = rows(HEADS, 7, 32, seed=3).softmax(-1)
    whole = codec.finished(codec.mixed(weights, records), fit)
    parts = sum(codec.mixed(weights[..., 8 * i : 8 * i + 8].clone(), records[:, i : i + 1]) for i in range(4))
    torch.testing.assert_close(codec.finished(parts, fit), whole, rtol=0, atol=1e-5 * max(1, float(whole.abs().max())))
    want = weights @ decoded(codec, records, fit)[1]
    torch.testing.assert_close(whole, want, rtol=0, atol=1e-5 * max(1, float(want.abs().max())))


@EVERY
def test_attention_changes_neither_queries_nor_weights_nor_records(bits):
    codec = codec_of(bits)
    keys, values = layer(16, 64)
    fit = codec.fit(keys, values)
    records, query = records_of(codec, keys, values, fit), rows(HEADS, 2, 64)
    weights = rows(HEADS, 2, 16).softmax(-1)
    before = [part.clone() for part in (keys, values, records, query, weights)]
    codec.encode(keys, values, fit)
    codec.logits(codec.turned(query, fit), records)
    codec.constant(query, fit)
    codec.finished(codec.mixed(weights, records), fit)
    decoded(codec, records, fit)
    for part, copy in zip((keys, values, records, query, weights), before, strict=True):
        assert torch.equal(part, copy)


@EVERY
@pytest.mark.parametrize("view", [lambda records: records[:, ::2], lambda records: records.transpose(0, 1)])
def test_attention_takes_any_view_of_records(bits, view):
    codec = codec_of(bits)
    keys, values = layer(16, 64)
    fit = codec.fit(keys, values)
    records = view(records_of(codec, keys, values, fit))
    query, weights = rows(HEADS, 3, 64), rows(HEADS, 3, 8 * records.shape[1])
    assert torch.equal(codec.logits(query, records), codec.logits(query, records.contiguous()))
    assert torch.equal(codec.mixed(weights, records), codec.mixed(weights, records.contiguous()))


@EVERY
def test_records_of_zeros_are_finite_everywhere(bits):
    """What a page holds after its last token is zeros, of weight 0."""
    codec = codec_of(bits)
    keys, values = layer(8, 64)
    fit = codec.fit(keys, values)
    records = torch.zeros((HEADS, 2, codec.chunk_bytes), dtype=torch.uint8)
    assert codec.logits(codec.turned(rows(HEADS, 2, 64), fit), records).isfinite().all()
    assert codec.mixed(torch.zeros((HEADS, 2, 16)), records).isfinite().all()


# ---- fits


FITTED = pytest.mark.parametrize("bits", [bits for bits in CODECS if codec_of(bits).needs_fit])


def same(one: Fit | None, other: Fit | None) -> bool:
    assert one is not None
    assert other is not None
    return torch.equal(one.centre, other.centre) and torch.equal(one.channels, other.channels)


@FITTED
@pytest.mark.parametrize("n", [2, 50, FIT_TOKENS, 3 * FIT_TOKENS])
def test_a_fit_does_not_read_beyond_the_first_thousand_tokens(bits, n):
    codec = codec_of(bits, 16)
    keys, values = layer(n, 16)
    want = codec.fit(keys, values)
    keys[:, FIT_TOKENS:] = values[:, FIT_TOKENS:] = float("nan")
    assert same(codec.fit(keys, values), want)


@FITTED
@pytest.mark.parametrize("n", [2, 50, FIT_TOKENS])
def test_an_outlying_first_token_costs_no_other_its_precision(bits, n):
    codec = codec_of(bits, 16)
    keys, values = layer(n, 16)
    outlying = keys.clone()
    outlying[:, 0, 3] = 1000
    off = []
    for part in (keys, outlying):
        fit = codec.fit(part, values)
        off.append(norm((codec.decode(codec.encode(part, values, fit), fit)[0] - part)[:, 1:]))
    assert off[1] <= 1.5 * off[0] + 1e-4


@FITTED
def test_a_fit_to_the_first_thousand_tokens_is_the_fit_to_more(bits):
    codec = codec_of(bits, 16)
    keys, values = layer(2000, 16)
    assert same(codec.fit(keys, values), codec.fit(keys[:, :FIT_TOKENS], values[:, :FIT_TOKENS]))


@FITTED
def test_a_fit_is_float32_of_each_heads_keys_and_values(bits):
    codec = codec_of(bits, 16, torch.bfloat16)
    keys, values = layer(30, 16, torch.bfloat16, centre=3)
    fit = codec.fit(keys, values)
    for part in (fit.centre, fit.channels):
        assert part.dtype == torch.float32
        assert part.shape == (HEADS, 2, 16)
        assert part.isfinite().all()
    values[1] *= 3
    other = codec.fit(keys, values)
    assert torch.equal(other.centre[0], fit.centre[0])
    assert torch.equal(other.channels[:, 0], fit.channels[:, 0])
    assert not same(other, fit)


def test_the_models_own_dtype_needs_no_fit():
    codec = codec_of(PLAIN)
    assert not codec.needs_fit
    assert codec.fit(*layer(30, 64)) is None


# ---- settings and devices


def everything(codec: Codec, device: str = "cpu") -> list[torch.Tensor]:
    keys, values = (part.to(device) for part in layer(16, 64, codec.dtype))
    query, weights = rows(HEADS, 3, 64).to(device), rows(HEADS, 3, 16).to(device)
    fit = codec.fit(keys, values)
    fields = codec.encode(keys, values, fit)
    records = torch.zeros((HEADS, 2, codec.chunk_bytes), dtype=torch.uint8, device=device)
    for place, field in zip(codec.fields(records), fields, strict=True):
        place.copy_(field.unflatten(1, (2, 8)))
    constant = codec.constant(query, fit)
    return [
        *fields,
        *codec.decode(fields, fit),
        codec.logits(codec.turned(query, fit), records),
        codec.finished(codec.mixed(weights, records), fit),
        *([] if constant is None else [constant]),
    ]


@EVERY
def test_results_are_on_the_device_of_the_tokens(bits):
    """Tensors of another device raise: these have a device, and no numbers."""
    hadamard.cache_clear()
    try:
        with FakeTensorMode():
            assert {part.device.type for part in everything(codec_of(bits), "cuda")} == {"cuda"}
    finally:
        hadamard.cache_clear()


@EVERY
def test_torchs_default_dtype_changes_no_result(bits):
    torch.manual_seed(0)
    want = everything(codec_of(bits, dtype=torch.bfloat16))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        keys, values = layer(16, 64, torch.bfloat16)
        codec = codec_of(bits, dtype=torch.bfloat16)
        fit = codec.fit(keys, values)
        got = codec.decode(codec.encode(keys, values, fit), fit)
    finally:
        torch.set_default_dtype(before)
    assert {part.dtype for part in got} == {torch.float32}
    assert {part.dtype for part in want} <= {torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.float16}


def test_every_codec_can_be_asked_for():
    assert tuple(CODECS) == HOST_BITS


@EVERY
def test_bits_are_the_key_of_the_codec(bits):
    codec = codec_of(bits)
    assert codec.bits == bits
    assert (codec.key_bits, codec.value_bits) == (bits, bits)
    numbers = 2 * codec.chunk_tokens * codec.head_dim
    if bits != PLAIN:
        assert 8 * codec.chunk_bytes >= bits * numbers
