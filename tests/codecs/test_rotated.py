"""The rotation of 4 bits, its scales, and what is fitted: the mean, and the first token."""

from __future__ import annotations

import pytest
import torch
from codec_examples import HEADS, layer, rows

from tieredkv.codecs import codec_for
from tieredkv.codecs.base import Fit
from tieredkv.codecs.rotated import LARGEST, hadamard, reflected

CPU = torch.device("cpu")


def turned(tokens: torch.Tensor, fit: Fit, part: int) -> torch.Tensor:
    """Keys (part 0) or values (1) as they are rounded."""
    centre, mirror = (of[:, part].unsqueeze(1) for of in (fit.centre, fit.channels))
    return reflected(tokens.float() - centre, mirror) @ hadamard(tokens.shape[-1], CPU)


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
    for part, (got, want, scales) in enumerate(zip(codec.decode(fields, fit), (keys, values), fields[2:], strict=True)):
        off = (turned(got, fit, part) - turned(want, fit, part)).abs()
        assert (off <= 0.504 * scales.float() + 1e-5).all()


def test_a_scale_is_no_larger_than_a_token_needs():
    codec = codec_for(4, 8, 64, torch.float32)
    keys, values = layer(300, 64, centre=10)
    fit = codec.fit(keys, values)
    scales = codec.encode(keys, values, fit)[2:]
    for number, (part, scale) in enumerate(zip((keys, values), scales, strict=True)):
        largest = turned(part, fit, number).abs().amax(-1, keepdim=True)
        torch.testing.assert_close(scale.float() * LARGEST, largest, rtol=1e-3, atol=1e-6)


def test_a_byte_holds_a_number_of_each_half():
    """Numbers are 7.5 less than what is stored."""
    codec = codec_for(4, 8, 4, torch.float32)
    fit = codec.fit(*torch.zeros((2, 1, 2, 4)))
    keys = (torch.tensor([7.5, -7.5, 3.5, -0.5]) @ hadamard(4, CPU)).expand(1, 2, 4)
    stored, _, scales, _ = codec.encode(keys, keys, fit)
    assert float(scales[0, 0]) == 1
    assert stored[0, 0].tolist() == [15 | 11 << 4, 0 | 7 << 4]


def test_all_sixteen_levels_are_used():
    codec = codec_for(4, 8, 64, torch.float32)
    keys, values = layer(300, 64)
    stored = codec.encode(keys, values, codec.fit(keys, values))[0]
    assert (stored & 15).unique().tolist() == (stored >> 4).unique().tolist() == list(range(16))


@pytest.mark.parametrize("size", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("times", [1, 1000])
def test_the_first_token_is_held_as_precisely_as_its_scale(size, times):
    codec = codec_for(4, 8, size, torch.float32)
    keys, values = layer(300, size, centre=3)
    keys[:, 0], values[:, 0] = times * keys[:, 0], times * values[:, 0]
    fit = codec.fit(keys, values)
    for got, want in zip(codec.decode(codec.encode(keys, values, fit), fit), (keys, values), strict=True):
        assert (got - want)[:, 0].norm() <= 3e-4 * want[:, 0].norm()
        assert (got - want)[:, 1].norm() > 0.01 * want[:, 1].norm()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("near", [0, 1e-6, 1e-3])
def test_a_first_token_that_needs_no_reflection_is_held_as_precisely(sign, near):
    """One of two reflections would be along the difference of two vectors that are all but equal."""
    codec = codec_for(4, 8, 64, torch.float32)
    keys, values = layer(300, 64)
    even = hadamard(64, CPU).sum(0)
    keys[:, 0] = codec.fit(keys, values).centre[:, 0] + sign * 10 * even + near * keys[:, 0]
    fit = codec.fit(keys, values)
    got = codec.decode(codec.encode(keys, values, fit), fit)[0]
    assert (got - keys)[:, 0].norm() <= 3e-4 * keys[:, 0].norm()


def test_a_reflection_is_its_own_inverse_and_keeps_lengths():
    tokens, mirror = rows(HEADS, 9, 64), torch.nn.functional.normalize(rows(HEADS, 1, 64, seed=1), dim=-1)
    once = reflected(tokens, mirror)
    assert not torch.allclose(once, tokens)
    torch.testing.assert_close(once.norm(dim=-1), tokens.norm(dim=-1))
    torch.testing.assert_close(reflected(once, mirror), tokens)
    assert torch.equal(reflected(tokens, torch.zeros_like(mirror)), tokens)


@pytest.mark.parametrize("first", [0.0, float("nan"), float("inf")])
def test_a_first_token_without_a_direction_turns_nothing(first):
    codec = codec_for(4, 8, 64, torch.float32)
    keys, values = layer(300, 64)
    keys[:, 0] = codec.fit(keys, values).centre[:, 0] + first
    assert not codec.fit(keys, values).channels[:, 0].any()
    assert codec.fit(keys, values).channels[:, 1].any(-1).all()


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
