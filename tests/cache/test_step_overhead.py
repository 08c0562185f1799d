"""A cache whose link is known selects less than fits, and keeps the rest of its slots as spare ones."""

from __future__ import annotations

from helpers import cap_share, tier_options

from tieredkv import TieredCache, use_attention
from tieredkv.environment.versions import cache_argument


def test_a_slow_link_leaves_slots_spare(llama, long_ids):
    tokens = long_ids.shape[1]

    def plan(**options):
        tiers = tier_options(gpu_kv_gb=cap_share(llama, tokens, 0.5), theta=2.0, budget_ratio=None, **options)
        with use_attention(llama), TieredCache(llama.config, **tiers, prompt_tokens=tokens) as cache:
            llama(long_ids, **cache_argument(cache))
            llama(long_ids[:, -1:], **cache_argument(cache))
            return cache.decoding._phases[0].plan

    unknown, slow, free = plan(), plan(link_gb_s=0.01), plan(link_gb_s=0.01, step_overhead=None)
    assert (unknown.bound, slow.bound, free.bound) == ("memory", "floor", "memory")
    assert slow.selected.sum() < unknown.selected.sum() == free.selected.sum()
    assert slow.slots.tolist() == unknown.slots.tolist()
