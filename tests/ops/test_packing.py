"""Pages in 8 bits: how precise they are, how much room they take, and when they are used."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers import assert_near, cap_share, tier_options
from transformers import DynamicCache

import tieredkv
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.ops.packing import LARGEST, channel_norms, pack, unpack


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_packing_is_the_obvious_rounding():
    keys, norms = rows(3, 5, 8), rows(5, 8, seed=1).abs() + 0.1
    numbers, scales = pack(keys, norms)
    for i in range(3):
        for j in range(5):
            sized = [float(keys[i, j, d]) / float(norms[j, d]) for d in range(8)]
            scale = float(torch.tensor(max(map(abs, sized)) / LARGEST).half())
            assert float(scales[i, j]) == scale
            for d in range(8):
                assert abs(int(numbers[i, j, d]) - min(127, max(-127, sized[d] / scale))) <= 0.5001


def test_a_number_is_off_by_at_most_half_a_step():
    keys, norms = 30 * rows(64, 16), rows(16, seed=1).abs() + 0.1
    numbers, scales = pack(keys, norms)
    step = scales.float().unsqueeze(-1) * norms
    assert ((unpack(numbers, scales, norms) - keys).abs() <= 0.5005 * step + 1e-6).all()


def test_scaling_by_a_power_of_two_scales_the_result():
    keys, norms = rows(32, 16), torch.ones(16)
    torch.testing.assert_close(
        unpack(*pack(keys * 64, norms), norms), 64 * unpack(*pack(keys, norms), norms), rtol=2e-3, atol=1e-3
    )


def test_channels_a_hundred_times_larger_do_not_round_the_others_away():
    keys = rows(1, 200, 1, 1, 16).expand(-1, -1, 2, 1, -1).clone()
    keys[..., :2] = 200 + 20 * keys[..., :2]
    norms = channel_norms(keys, 200)[0, 0]
    kept = unpack(*pack(keys[0, :, 0, 0], norms), norms)
    assert (kept - keys[0, :, 0, 0])[:, 2:].abs().max() < 0.05
    plain = unpack(*pack(keys[0, :, 0, 0], torch.ones(16)), torch.ones(16))
    assert (plain - keys[0, :, 0, 0])[:, 2:].abs().max() > 0.5, "a single factor would have done"


def test_a_channel_that_is_occasionally_large_does_not_round_the_others_away():
    keys = rows(1, 1000, 1, 1, 16).expand(-1, -1, 2, 1, -1).clone()
    keys[..., 0] *= 0.05
    keys[:, ::40, ..., 0] = 5
    norms = channel_norms(keys, 1000)[0, 0]
    off = (unpack(*pack(keys[0, :, 0, 0], norms), norms) - keys[0, :, 0, 0])[:, 1:].abs().max()
    assert off < 0.06
    mean = keys[0, :, 0, 0].abs().mean(0)
    assert (unpack(*pack(keys[0, :, 0, 0], mean), mean) - keys[0, :, 0, 0])[:, 1:].abs().max() > 1.5 * off


def test_zeros_stay_zeros():
    numbers, scales = pack(torch.zeros(2, 8), torch.ones(8))
    assert not numbers.any()
    assert not scales.any()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e9])
def test_values_that_cannot_be_packed_become_nan(broken):
    keys = rows(2, 8)
    keys[1, 3] = broken
    out = unpack(*pack(keys, torch.ones(8)), torch.ones(8))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_a_norm_is_a_power_of_the_size_that_few_tokens_exceed():
    chunks = rows(2, 200, 2, 8, 16)
    norms = channel_norms(chunks, 1600)
    tokens = chunks[1, :128, 0, :, 5].flatten()[1::4].abs().sort(descending=True).values
    assert len(tokens) == 256
    assert float(norms[1, 0, 5]) == pytest.approx(float(tokens[2]) ** 0.75, rel=1e-5)


def test_norms_come_only_from_tokens_that_were_written():
    chunks = rows(2, 4, 2, 8, 16)
    chunks[:, 3, :, 3:] = float("nan")
    want = chunks.transpose(1, 2).reshape(2, 2, 32, 16)[:, :, 1:27].abs().amax(2) ** 0.75
    torch.testing.assert_close(channel_norms(chunks, 27), want)


def test_an_outlying_first_token_does_not_set_the_norms():
    chunks = rows(1, 100, 2, 8, 16)
    for tokens in (1, 2, 50, 800):
        want = channel_norms(chunks, tokens)
        outlying = chunks.clone()
        outlying[:, 0, :, 0] *= 1000
        assert torch.equal(channel_norms(outlying, tokens), want) == (tokens > 1)


def test_a_channel_that_is_always_zero_has_a_norm():
    chunks = rows(1, 2, 2, 8, 4)
    chunks[..., 2] = 0
    sizes = channel_norms(chunks, 16)
    assert (sizes[..., 2] == 1).all()


@contextmanager
def tiered(model, **fields):
    tiers = tieredkv.TierConfig(**tier_options(text_window=16, **fields))
    with torch.no_grad(), tieredkv.use_attention(model), TieredCache(model.config, tiers, max_new_tokens=9) as cache:
        yield cache


def answered(model, ids, **fields):
    """Logits of eight forced tokens after a prompt, the cache's bytes by purpose, and its plan."""
    with tiered(model, **fields) as cache:
        out = steps(model, ids, cache)
        return out, cache.ledger.by_purpose(), cache.tiered_layers[0].sealed.phase.plan


def steps(model, ids, cache):
    model(ids[:, :-8], **cache_argument(cache))
    return torch.cat([model(ids[:, i : i + 1], **cache_argument(cache)).logits for i in range(-8, -1)], dim=1)


POLICIES = pytest.mark.parametrize("policy", ["hybridkv", "quest", "snapkv", "lookm"])


@POLICIES
def test_logits_are_close_to_those_of_unpacked_pages(text_model, long_ids, policy):
    fields = {"gpu_kv_gb": 1, "budget_ratio": 0.4, "policy": policy, "stay": 1.0}
    packed, _, plan = answered(text_model, long_ids, **fields)
    exact, _, other = answered(text_model, long_ids, **fields, pack_pages=False)
    assert plan.packed
    assert not other.packed
    assert torch.equal(plan.selected, other.selected)
    assert (packed - exact).abs().max() < 0.05 * exact.abs().max()  # near ties in rank may be decided differently
    assert not torch.equal(packed, exact)


def test_a_packed_pool_takes_the_bytes_of_its_numbers_and_scales(llama, long_ids):
    fields = {"gpu_kv_gb": 1, "budget_ratio": 0.4}
    _, packed, plan = answered(llama, long_ids, **fields)
    _, exact, _ = answered(llama, long_ids, **fields, pack_pages=False)
    d = llama.config.head_dim
    assert packed["pool"] == plan.pool_pages(
        [*range(llama.config.num_hidden_layers)]
    ) * 2 * plan.layout.chunk_tokens * (d + 2)
    assert packed["pool"] * 4 * d == exact["pool"] * (d + 2)  # the model is in float32


def test_under_one_cap_more_chunks_are_attended_to(llama, long_ids):
    cap = cap_share(llama, long_ids.shape[1], 0.5)
    _, _, packed = answered(llama, long_ids, gpu_kv_gb=cap)
    _, _, exact = answered(llama, long_ids, gpu_kv_gb=cap, pack_pages=False)
    assert packed.selected.sum() > 1.5 * exact.selected.sum()


def test_what_fits_unpacked_is_not_packed(llama, long_ids):
    logits, _, plan = answered(llama, long_ids, gpu_kv_gb=1)
    assert not plan.packed
    assert_near(logits, llama(long_ids).logits[:, -8:-1])


def test_where_everything_fits_in_eight_bits_nothing_is_left_out(llama, long_ids):
    cap = cap_share(llama, long_ids.shape[1] + 9, 0.9)
    logits, _, plan = answered(llama, long_ids, gpu_kv_gb=cap)
    assert plan.packed
    assert not plan.ranked
    stock = llama(long_ids).logits[:, -8:-1]
    assert (logits - stock).abs().max() < 0.02 * stock.abs().max()


@pytest.mark.parametrize("tokens", [1, 3, 20, 33])
def test_a_short_prompt_that_is_attended_to_whole_is_exact_under_any_ratio(llama, prompt_ids, tokens):
    ids = prompt_ids[:, : tokens + 8]
    logits, _, plan = answered(llama, ids, gpu_kv_gb=1, budget_ratio=0.1)
    assert not plan.packed
    assert_near(logits, llama(ids).logits[:, -8:-1])


@pytest.mark.parametrize("policy", ["hybridkv", "snapkv"])
@pytest.mark.parametrize("chunk_tokens", [8, 64])
def test_packing_at_the_seal_takes_less_than_the_cap_leaves(llama, policy, chunk_tokens):
    """What a seal allocates, what it keeps included, by torch's profiler."""
    ids = torch.randint(0, 97, (1, 6000), generator=torch.Generator().manual_seed(0))
    options = {"gpu_kv_gb": cap_share(llama, 6000, 0.2), "chunk_tokens": chunk_tokens, "policy": policy}
    with tiered(llama, **options) as cache:
        llama(ids, **cache_argument(cache))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            cache.seal()
        assert cache.tiered_layers[0].sealed.pages.packing is not None
        live = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                peak = max(peak, live)
        assert peak <= cache.tiers.cap_bytes


def test_the_full_cache_is_never_packed(llama, long_ids):
    with pytest.raises(tieredkv.BudgetError):
        answered(llama, long_ids, policy="full", gpu_kv_gb=cap_share(llama, long_ids.shape[1], 0.6))


def test_generated_tokens_return_to_the_host_as_the_pool_stored_them(llama, long_ids):
    stock = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(long_ids, **cache_argument(stock))
    with tiered(llama, gpu_kv_gb=1, budget_ratio=0.9) as cache:
        steps(llama, long_ids, cache)
        cache.unseal()
        taken = cache.tiered_layers[0].host.tokens(1, torch.arange(893, 899))
    for got, want in zip(taken, (stock.layers[0].keys, stock.layers[0].values), strict=True):
        wanted = want[0, 1, 893:899]
        assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()
        assert not torch.equal(got, wanted)
