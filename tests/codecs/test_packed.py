"""8 bits: integers times a scale, and the norms of channels."""

from __future__ import annotations

import pytest
import torch
from codec_examples import layer

from tieredkv.codecs import codec_for
from tieredkv.codecs.packed import LARGEST

EIGHT = codec_for(8, 8, 64, torch.float32)


@pytest.mark.parametrize("centre", [0, 10, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_number_is_off_by_at_most_half_a_scale_times_its_norm(centre, dtype):
    codec = codec_for(8, 8, 64, dtype)
    keys, values = layer(300, 64, dtype, centre)
    fit = codec.fit(keys, values)
    fields = codec.encode(keys, values, fit)
    for number, (got, want) in enumerate(zip(codec.decode(fields, fit), (keys, values), strict=True)):
        step = fields[2 + number].float() * fit.channels[:, number].unsqueeze(1)
        assert ((got - want.float()).abs() <= 0.5005 * step + 1e-6).all()


def test_a_scale_is_no_larger_than_a_token_needs():
    keys, values = layer(300, 64, centre=10)
    fit = EIGHT.fit(keys, values)
    scales = EIGHT.encode(keys, values, fit)[2:]
    for number, (part, scale) in enumerate(zip((keys, values), scales, strict=True)):
        largest = (part / fit.channels[:, number].unsqueeze(1)).abs().amax(-1, keepdim=True)
        torch.testing.assert_close(scale.float() * LARGEST, largest, rtol=1e-3, atol=1e-6)


def test_keys_and_values_have_norms_of_their_own():
    keys, values = layer(300, 64)
    keys[..., 3] *= 100
    fit = EIGHT.fit(keys, values)
    assert (fit.channels[:, 0, 3] > 20 * fit.channels[:, 0, 4]).all()
    assert (fit.channels[:, 1, 3] < 2 * fit.channels[:, 1, 4]).all()
    assert not fit.centre.any()


def test_a_channel_that_is_always_zero_has_a_norm():
    keys, values = layer(30, 64)
    keys[..., 2] = 0
    assert (EIGHT.fit(keys, values).channels[:, 0, 2] == 1).all()
