"""Every preset by name: it runs, it is exact with room for all, and its own formulas give what they should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_near, cap_share, pressed, session_logits, stock_inputs, stock_logits, tier_options
from test_prune import tokens

import tieredkv
from tieredkv.cache.question import Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import BudgetError, OptionError
from tieredkv.policy.presets import POLICIES, lookm, mixkv, streaming
from tieredkv.policy.prune import kept_tokens

EVERY = pytest.mark.parametrize("policy", POLICIES)
SMALL = {"chunk_tokens": 8, "text_window": 16, "recent_window": 8}


@EVERY
def test_full_budget_equals_stock_transformers(text_model, prompt_ids, policy):
    stock = stock_logits(text_model, {"input_ids": prompt_ids}, 12)
    with tieredkv.use_attention(text_model), TieredCache(text_model.config, gpu_kv_gb=1, policy=policy) as cache:
        tiered = stock_logits(text_model, {"input_ids": prompt_ids}, 12, **cache_argument(cache))
    assert_near(tiered, stock)


@EVERY
def test_full_budget_by_ratio_equals_stock_transformers(llama, long_ids, policy):
    options = {"gpu_kv_gb": 1, "budget_ratio": 1.0, "policy": policy, **SMALL}
    stock = stock_logits(llama, {"input_ids": long_ids}, 12)
    with tieredkv.use_attention(llama), TieredCache(llama.config, **tier_options(**options)) as cache:
        tiered = stock_logits(llama, {"input_ids": long_ids}, 12, **cache_argument(cache))
    assert_near(tiered, stock)


@EVERY
def test_generate_with_every_preset(video_model, processor, frames, policy):
    """Under a cap that holds what the policy needs; the cap holds, and the answer is as long as asked for."""
    share = 3.0 if policy == "full" else 1.2 if policy == "quest" else 0.6
    answer = tieredkv.generate(
        video_model,
        frames,
        "follow the star for 2 ?",
        **pressed(video_model, 500, share),
        processor=processor,
        fps=4,
        max_new_tokens=5,
        min_new_tokens=5,
        **tier_options(policy=policy, **SMALL),
    )
    assert answer.stats.new_tokens == 5
    assert answer.stats.kv_device_peak_bytes <= answer.stats.kv_cap_bytes


def test_full_is_refused_where_it_does_not_fit(llama, long_ids):
    options = {"gpu_kv_gb": cap_share(llama, 900, 0.9), "policy": "full", **SMALL}
    with (
        tieredkv.use_attention(llama),
        TieredCache(llama.config, **tier_options(**options)) as cache,
        pytest.raises(BudgetError, match="the smallest that works is"),
    ):
        llama.generate(long_ids, **cache_argument(cache), max_new_tokens=2)


def test_dense_layers_keep_everything_whatever_the_budget(llama, long_ids):
    options = {"gpu_kv_gb": 1, "budget_ratio": 0.1, "policy": "quest", "dense_layers": 1, **SMALL}
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, **tier_options(**options)) as cache:
        llama(long_ids, **cache_argument(cache))
        llama(long_ids[:, :1], **cache_argument(cache))
        attended = [layer.sealed.pages.lengths.sum(1).tolist() for layer in cache.tiered_layers]
    assert attended[0] == [901] * len(attended[0])
    assert max(attended[1]) < 200


@pytest.mark.parametrize(
    ("field", "value"),
    [("digest", "x"), ("chunk_group", 3), ("dense_layers", -1), ("dense_layers", True), ("theta", "x"),
     ("theta", float("nan")), ("reuse_above", float("nan")), ("static_weight", "x"), ("score_group", "min"),
     ("top_k_ratio", "a"), ("top_k_ratio", 0), ("type_split", 1.5), ("saliency_pool", 4), ("digest_bits", 4.0),
     ("stay", 0.5), ("rank", "snapkv"), ("merge", 1), ("keep_all", 1)],
)  # fmt: skip
def test_invalid_fields_of_a_policy_are_refused(field, value):
    with pytest.raises(OptionError, match=f"{field}=.* is not valid: give"):
        replace(POLICIES["hybridkv"], **{field: value})


@EVERY
def test_every_preset_says_what_it_is_and_where_it_is_from(policy):
    preset = POLICIES[policy]
    assert preset.name == policy
    assert preset.source
    assert len(preset.summary) > 60


# ---- MixKV


def test_redundancy_is_the_mean_cosine_of_all_pairs():
    keys = torch.randn(7, 5)
    pairs = [torch.cosine_similarity(keys[i], keys[j], dim=0) for i in range(7) for j in range(7) if i != j]
    torch.testing.assert_close(mixkv.redundancy(keys), torch.stack(pairs).mean())


def test_diversity_is_highest_for_the_key_unlike_the_others():
    keys = torch.tensor([[1.0, 0.0], [0.9, 0.1], [1.0, -0.1], [0.0, 1.0]])
    assert int(mixkv.diversity(keys).argmax()) == 3
    mean = torch.nn.functional.normalize(keys, dim=-1).mean(0)
    want = torch.stack([-torch.cosine_similarity(key, mean, dim=0) for key in keys])
    torch.testing.assert_close(mixkv.diversity(keys), want)


def test_importance_adds_value_norms_at_the_mean_of_attention():
    saliency, values = torch.tensor([0.1, 0.3, 0.5]), torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 3.0]])
    attention, norms = [0, 0.5, 1], [1.0, 0.0, 0.5]  # min-max scaled; equal means
    torch.testing.assert_close(
        mixkv.importance(saliency, values), torch.tensor([a + n for a, n in zip(attention, norms, strict=True)])
    )


def test_mixkv_weighs_diversity_by_redundancy():
    """All keys alike: only diversity counts. Keys that share nothing: only importance."""
    saliency, values = torch.tensor([0.9, 0.1, 0.2, 0.3]), torch.ones(4, 4)
    apart = tokens(saliency, keys=torch.eye(4), values=values)
    assert kept_tokens(mixkv.rank(apart), 1).tolist() == [0]
    alike = torch.ones(4, 4) + 0.2 * torch.tensor([0.0, 0, 0, 1]).diag()
    assert kept_tokens(mixkv.rank(tokens(saliency, keys=alike, values=values)), 1).tolist() == [3]


def test_mixkv_ignores_the_scale_of_values():
    saliency, keys, values = torch.rand(9), torch.randn(9, 4), torch.randn(9, 4)
    same = mixkv.rank(tokens(saliency, keys=keys, values=values))
    torch.testing.assert_close(mixkv.rank(tokens(saliency, keys=keys, values=values * 7)), same)


# ---- LOOK-M


def test_lookm_averages_each_evicted_token_into_the_nearest_kept_one():
    keys, values = torch.randn(12, 4), torch.randn(12, 4)
    kept = torch.tensor([1, 5, 8])
    owners = {int(k): [int(k)] for k in kept}
    for gone in set(range(12)) - set(kept.tolist()):
        near = max(owners, key=lambda k: torch.cosine_similarity(keys[gone], keys[k], dim=0).item())
        owners[near].append(gone)
    got_keys, got_values = lookm.merge(tokens(torch.rand(12), keys=keys, values=values), kept)
    for row, group in enumerate(owners.values()):
        torch.testing.assert_close(got_keys[row], keys[group].mean(0))
        torch.testing.assert_close(got_values[row], values[group].mean(0))


def test_lookm_with_nothing_evicted_changes_nothing():
    keys, values = torch.randn(4, 4), torch.randn(4, 4)
    got = lookm.merge(tokens(torch.rand(4), keys=keys, values=values), torch.arange(4))
    torch.testing.assert_close(got, (keys, values))


# ---- streaming


def test_streaming_keeps_sinks_and_the_latest():
    assert kept_tokens(streaming.rank(tokens(torch.rand(10), sinks=2)), 5).tolist() == [0, 1, 7, 8, 9]


# ---- reuse


def test_with_correction_always_on_reuse_changes_nothing(llama, long_ids):
    def answer(**options):
        options = {**pressed(llama, 900, 0.7), "policy": "arkvale", **SMALL, **options}
        with tieredkv.use_attention(llama), TieredCache(llama.config, **tier_options(**options)) as cache:
            return stock_logits(llama, {"input_ids": long_ids}, 12, **cache_argument(cache)), cache.counters

    exact, _ = answer()
    corrected, counters = answer(reuse_above=1.0)
    assert torch.equal(corrected, exact)
    assert counters.reused == 0
    _, counters = answer(reuse_above=-1.0)
    assert counters.reused > 0


# ---- the estimate of unseen mass


def unseen(llama, long_ids, **options):
    """Estimated and true unseen share of attention mass, mean over steps and heads."""
    options = {"gpu_kv_gb": 1, "budget_ratio": 0.3, "theta": 2.0, "digest_bits": 8, **SMALL, **options}
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, **tier_options(**options)) as cache:
        cache.expect(Question(trace=True))
        llama(long_ids, **cache_argument(cache))
        cache.seal()
        with cache.forced():
            llama(long_ids[:, 50:60], **cache_argument(cache))
        true = []
        for selection in cache.counters.trace:
            layer = cache.tiered_layers[selection.layer]
            layout, recent = layer.sealed.phase.plan.layout, 900 + selection.step
            keys = layer.host.keys().flatten(1, 2)[:, : layout.recent_start]
            generated, _ = layer.sealed.pages.generated_tokens()
            rest = layer.host.keys().flatten(1, 2)[:, layout.recent_start : 900]
            keys = torch.cat((keys, rest, generated[:, : recent - 900]), dim=1)
            weights = (selection.query @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5).softmax(-1).mean(1)
            for row, head in enumerate(selection.heads.tolist()):
                attended = torch.zeros(keys.shape[1])
                attended[: layout.sink_chunks * 8] = attended[layout.recent_start :] = 1
                for first in selection.first_token[row].tolist():
                    attended[first : first + 8] = 1
                true.append(float((weights[head] * (1 - attended)).sum()))
        return cache.counters.unseen_mass, sum(true) / len(true)


def test_the_estimate_is_near_the_mass_that_was_not_seen(llama, long_ids):
    estimated, true = unseen(llama, long_ids)
    assert 0.05 < true < 0.95
    assert abs(estimated - true) < 0.05


def test_digests_that_bound_logits_give_no_estimate(llama, long_ids):
    assert unseen(llama, long_ids, digest="minmax")[0] is None


def test_adaptive_heads_grow_into_their_spare_slots_and_see_more(llama, long_ids):
    fixed, _ = unseen(llama, long_ids, spare_ratio=0.5)
    grown, true = unseen(llama, long_ids, spare_ratio=0.5, adaptive=True)
    assert grown < fixed - 0.05
    assert abs(grown - true) < 0.05


@pytest.mark.parametrize(
    "fields",
    [{"adaptive": True, "digest": "cuboid"}, {"adaptive": True, "reuse_above": 0.5}, {"policy": "quest", "stay": 2.0}],
)
def test_incompatible_settings_are_refused(fields):
    with pytest.raises(OptionError, match="is not valid"):
        tieredkv.TierConfig(**tier_options(**fields))


# ---- what digests are fitted to


def test_a_question_leaves_nothing_behind_when_the_digest_changes(llama, long_ids):
    """The context is settled under another kind; the new kind is fitted to the context, not to the first question."""
    context, first, second = long_ids[:, :700], long_ids[:, 700:800], long_ids[:, 800:]
    options = {"gpu_kv_gb": 1, "budget_ratio": 0.2, "theta": 2.0, **SMALL}

    def answer(*questions):
        with (
            torch.no_grad(),
            tieredkv.use_attention(llama),
            TieredCache(llama.config, **tier_options(digest="cuboid", **options)) as cache,
        ):
            llama(context, **cache_argument(cache))
            cache.settle()
            cache.set_tiers(tieredkv.TierConfig(**tier_options(digest="sketch", **options)))
            for question in questions:
                llama(question, **cache_argument(cache))
                cache.seal()
                logits = llama(long_ids[:, :1], **cache_argument(cache)).logits
                cache.truncate(700)
        return logits

    assert torch.equal(answer(first, second), answer(second))


def test_a_digest_fitted_to_few_tokens_is_fitted_again_to_more(llama, long_ids):
    with (
        torch.no_grad(),
        tieredkv.use_attention(llama),
        TieredCache(llama.config, **tier_options(gpu_kv_gb=1, **SMALL)) as cache,
    ):
        llama(long_ids[:, :40], **cache_argument(cache))
        cache.seal()
        before = cache.tiered_layers[0].digests.fitted
        cache.unseal()
        llama(long_ids[:, 40:], **cache_argument(cache))
        cache.seal()
        after = cache.tiered_layers[0].digests.fitted
    assert not torch.equal(before.up, after.up)


def test_chunks_are_chosen_alike_however_a_prompt_is_cut_into_calls(llama, long_ids):
    """A basis is fitted to all of a prompt of this length, and not to its first call."""

    def chosen(call):
        options = tier_options(gpu_kv_gb=1, budget_ratio=0.2, theta=2.0, **SMALL)
        with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, **options) as cache:
            cache.expect(Question(trace=True))
            for part in long_ids.split(call, dim=1):
                llama(part, **cache_argument(cache))
            for token in range(3):
                llama(long_ids[:, token : token + 1], **cache_argument(cache))
            return torch.stack([step.first_token for step in cache.counters.trace])

    assert (chosen(100) == chosen(900)).float().mean() > 0.9  # up to the order of sums


def test_prefill_in_inference_mode_and_decoding_outside_it(llama, long_ids):
    options = {"gpu_kv_gb": 1, "budget_ratio": 0.2, **SMALL}
    with tieredkv.use_attention(llama), TieredCache(llama.config, **tier_options(**options)) as cache:
        with torch.inference_mode():
            llama(long_ids, **cache_argument(cache))
            cache.seal()
        with torch.no_grad():
            for place in range(4):
                llama(long_ids[:, place : place + 1], **cache_argument(cache))
    assert cache.counters.selected > 0


# ---- forced tokens


@pytest.mark.parametrize("share", [0.35, 0.45, 0.6, 0.8])
def test_forced_tokens_fit_any_cap_that_single_ones_fit(llama, long_ids, share):
    options = {**pressed(llama, 900, share), "theta": 2.0, **SMALL}
    with (
        torch.no_grad(),
        tieredkv.use_attention(llama),
        TieredCache(llama.config, **tier_options(**options), max_new_tokens=20) as cache,
    ):
        llama(long_ids, **cache_argument(cache))
        cache.seal()
        with cache.forced():
            llama(long_ids[:, :20], **cache_argument(cache))
        assert cache.ledger.peak_bytes <= cache.ledger.cap_bytes


@EVERY
def test_forced_tokens_give_what_one_call_each_gives(llama, long_ids, policy):
    options = {"gpu_kv_gb": 1, "budget_ratio": 0.2, "policy": policy, **SMALL}
    logits = []
    for forced in (False, True):
        with (
            torch.no_grad(),
            tieredkv.use_attention(llama),
            TieredCache(llama.config, **tier_options(**options)) as cache,
        ):
            llama(long_ids, **cache_argument(cache))
            cache.seal()
            fed = long_ids[:, 100:120]
            with cache.forced():
                parts = [fed] if forced else fed.split(1, dim=1)
                logits.append(torch.cat([llama(part, **cache_argument(cache)).logits for part in parts], dim=1))
            assert cache.get_seq_length() == 920
    assert_near(logits[1], logits[0])


def test_a_cache_can_be_sealed_again_under_other_settings(llama, long_ids):
    options = {"gpu_kv_gb": 1, "budget_ratio": 0.2, **SMALL}

    def decode(cache):
        cache.seal()
        logits = llama(long_ids[:, :1], **cache_argument(cache)).logits
        cache.truncate(900)
        return logits

    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, **tier_options(**options)) as cache:
        llama(long_ids, **cache_argument(cache))
        first = decode(cache)
        cache.set_tiers(tieredkv.TierConfig(**tier_options(policy="quest", **options)))
        other = decode(cache)
        cache.set_tiers(tieredkv.TierConfig(**tier_options(**options)))
        again = decode(cache)
        with pytest.raises(tieredkv.OptionError, match="leave chunk_tokens as it is"):
            cache.set_tiers(tieredkv.TierConfig(gpu_kv_gb=1, chunk_tokens=16))
    assert torch.equal(again, first)
    assert not torch.equal(other, first)


def test_video_question_with_full_budget_by_ratio(video_model, processor, frames):
    question = "follow the star for 2 ?"
    stock = stock_logits(video_model, stock_inputs(processor, frames, question), 4)
    options = {"gpu_kv_gb": 1, "budget_ratio": 1.0, "processor": processor, "fps": 4, "positions": "stock"}
    with tieredkv.open_session(video_model, frames, **tier_options(**options, **SMALL)) as session:
        assert_near(session_logits(session, question, 4), stock)
