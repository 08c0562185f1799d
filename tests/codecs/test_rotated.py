"""The rotation of 4 bits, its scales, and the mean that is taken off."""

from __future__ import annotations

import pytest
import torch
from codec_examples import HEADS, layer, rows

from tieredkv.codecs import codec_for
from tieredkv.codecs.rotated import LARGEST, hadamard

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [2, 16, 64, 80, 96, 128, 256])
def test_the_rotation_is_its_own_inverse(size):
    turn = hadamard(size, CPU)
    torch.testing.assert_close(turn @ turn, torch.eye(size), rtol=0, atol=1e-6)
    assert torch.equal(turn, turn.T)


@pytest.mark.parametrize(("size", "block"), [(128, 128), (96, 32), (80, 16)])
def test_the_rotation_spreads_a_channel_over_its_block(size, block):
    turn = hadamard(size, CPU)
    assert turn.count_nonzero() == size * block
    torch.testing.assert_close(turn[turn != 0].abs(), torch.full((size * block,), block**-0.5))


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rotated_number_is_off_by_at_most_half_a_scale(size, dtype):
    codec = codec_for(4, 8, size, dtype)
    keys, values = layer(300, size, dtype, centre=10)
    fit = codec.fit(keys, values)
    fields = codec.encode(keys, values, fit)
    for got, want, scales in zip(codec.decode(fields, fit), (keys, values), fields[2:], strict=True):
        off = ((got - want.float()) @ hadamard(size, CPU)).abs()
        assert (off <= 0.502 * scales.float() + 1e-5).all()


def test_a_scale_is_no_larger_than_a_token_needs():
    codec = codec_for(4, 8, 64, torch.float32)
    keys, values = layer(300, 64, centre=10)
    fit = codec.fit(keys, values)
    scales = codec.encode(keys, values, fit)[2:]
    for number, (part, scale) in enumerate(zip((keys, values), scales, strict=True)):
        largest = ((part - fit.centre[:, number].unsqueeze(1)) @ hadamard(64, CPU)).abs().amax(-1, keepdim=True)
        torch.testing.assert_close(scale.float() * LARGEST, largest, rtol=1e-3, atol=1e-6)


def test_a_byte_holds_a_number_of_each_half():
    codec = codec_for(4, 8, 4, torch.float32)
    want = torch.tensor([7.0, -7, 3, 0])
    keys = (want @ hadamard(4, CPU)).expand(1, 2, 4).contiguous()
    fit = codec.fit(torch.zeros_like(keys), torch.zeros_like(keys))
    stored, _, scales, _ = codec.encode(keys, keys, fit)
    assert float(scales[0, 0]) == 1
    assert stored[0, 0].tolist() == [7 + 8 | (3 + 8) << 4, -7 + 8 | (0 + 8) << 4]


def test_a_constant_of_all_tokens_costs_no_precision():
    codec = codec_for(4, 8, 64, torch.float32)
    off = []
    for centre in (0, 1000):
        keys, values = layer(300, 64, centre=centre)
        fit = codec.fit(keys, values)
        got = codec.decode(codec.encode(keys, values, fit), fit)
        off.append([float((part - want).norm()) for part, want in zip(got, (keys, values), strict=True)])
    assert off[1] == pytest.approx(off[0], rel=0.02)


def test_channels_a_hundred_times_larger_are_spread():
    """Without the rotation, 7 steps to a channel of 100 would round all others to zero."""
    codec = codec_for(4, 8, 64, torch.float32)
    keys, values = rows(2, HEADS, 300, 64)
    keys[..., 5] *= 20
    fit = codec.fit(keys, values)
    off = codec.decode(codec.encode(keys, values, fit), fit)[0] - keys
    rounded = 20 * 3 / LARGEST * (keys / (20 * 3 / LARGEST)).round() - keys
    assert off.norm() < 0.75 * rounded.norm()


def test_the_mean_is_that_of_the_sampled_tokens():
    codec = codec_for(4, 8, 16, torch.float32)
    keys, values = layer(1100, 16, centre=2)
    fit = codec.fit(keys, values)
    torch.testing.assert_close(fit.centre[:, 0], keys[:, 1:1024:4].mean(1))
    torch.testing.assert_close(fit.centre[:, 1], values[:, 1:1024:4].mean(1))
