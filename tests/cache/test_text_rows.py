"""What the question's rows decide at the seal, and what a step reuses of the previous step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from helpers import assert_near, tier_options

import tieredkv
from tieredkv.cache import prefill
from tieredkv.cache.counters import Counters
from tieredkv.cache.prefill import TextRows
from tieredkv.cache.question import Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.policy import classify

C = 8
SMALL = {"gpu_kv_gb": 1.0, "chunk_tokens": C, "text_window": 32, "recent_window": 8, "spare_ratio": 0.5}


# ---- names inside the package that this file depends on


def settings(fields: dict[str, Any]) -> tieredkv.TierConfig:
    return tieredkv.TierConfig(**tier_options(**{**SMALL, **fields}))


def decode(
    model: Any, ids: torch.Tensor, attention: torch.Tensor | None = None, tokens: tuple[int, ...] = (50,), **fields: Any
) -> Counters:
    """Counters, with a trace, of `tokens` decoded one by one after a prompt.

    attention `(L, K, N)`: stands in for the rows' attention to each token; None: their real attention.
    """
    tiers = settings(fields)
    with torch.no_grad(), tieredkv.use_attention(model), TieredCache(model.config, tiers) as cache:
        cache.expect(Question(trace=True))
        rows = [
            TextRows(torch.ones(len(paid)), paid.expand(2, -1, -1), 32)
            for paid in (() if attention is None else attention)
        ]
        with patch.object(prefill, "score_text_rows", side_effect=rows) if rows else nullcontext():
            model(ids, **cache_argument(cache))
        cache.seal()
        for token in tokens:
            model(torch.tensor([[token]]), **cache_argument(cache))
        return cache.counters


# ---- tests


def test_few_rows_make_no_head_static(llama, long_ids):
    fields = {"budget_ratio": 0.7, "theta": 0.5}
    assert decode(llama, long_ids, **fields).static_heads > 0
    assert decode(llama, long_ids, **fields, text_window=10).static_heads == 0


def test_the_pool_begins_with_the_chunks_that_rows_looked_at_most(llama, long_ids):
    """The first step then finds in it all that it chooses; or nothing, if the rows looked at everything else."""
    fields = {"budget_ratio": 0.2, "theta": 2.0}
    attention = torch.zeros(3, 2, 900)
    for step in decode(llama, long_ids, **fields).trace:
        for head, chosen in zip(step.heads.tolist(), step.first_token, strict=True):
            for first in chosen[chosen >= 0].tolist():
                attention[step.layer, head, first : first + C] = 1
    assert decode(llama, long_ids, attention, **fields).hit_rate == 1
    assert decode(llama, long_ids, 1 - attention, **fields).hit_rate == 0


def chunks_chosen(counters: Counters) -> tuple[int, int]:
    """Number chosen by each of two heads in a step; the same in every layer."""
    first, second = {tuple((step.first_token >= 0).sum(1).tolist()) for step in counters.trace}.pop()
    return first, second


def test_a_dynamic_head_whose_attention_is_spread_wider_chooses_more_chunks(llama, long_ids):
    """One head pays half of its attention to a single token and the rest evenly to all; one pays evenly to a third."""
    wide, narrow = torch.full((900,), 0.5 / 900), torch.zeros(900)
    wide[400] += 0.5
    narrow[300:600] = 1 / 300
    counters = decode(llama, long_ids, torch.stack((wide, narrow)).expand(3, 2, 900), budget_ratio=0.3)
    assert counters.dynamic_heads == 6
    more, fewer = chunks_chosen(counters)
    assert more > 1.2 * fewer


def test_no_dynamic_head_chooses_few_chunks_however_narrow_its_attention(llama, long_ids):
    """One head pays nearly all of its attention to a single token, but needs many for the rest; one pays evenly."""
    narrow, even = torch.full((900,), 0.08 / 900), torch.full((900,), 1 / 900)
    narrow[400] += 0.92
    counters = decode(llama, long_ids, torch.stack((narrow, even)).expand(3, 2, 900), budget_ratio=0.3)
    assert counters.dynamic_heads == 6
    fewer, more = chunks_chosen(counters)
    assert 0.15 * more < fewer < 0.4 * more


def cosines(counters: Counters) -> torch.Tensor:
    """Cosine of each step's query with the previous one, `(steps - 1, L, K)`: mean over the group."""
    queries = torch.stack([step.query for step in counters.trace]).unflatten(0, (-1, 3))
    return torch.cosine_similarity(queries[1:], queries[:-1], dim=-1).mean(-1)


def test_a_head_reuses_its_chunks_where_its_query_is_like_the_previous_one(llama, long_ids):
    fields = {"policy": "arkvale", "budget_ratio": 0.2, "tokens": (50, 51, 51, 52, 50, 50, 53)}
    middle = float(cosines(decode(llama, long_ids, **fields)).median())
    counters = decode(llama, long_ids, **fields, reuse_above=middle)
    alike = cosines(counters) >= middle
    assert alike.any()
    assert not alike.all()
    chosen = torch.stack([step.first_token for step in counters.trace]).unflatten(0, (-1, 3))
    assert counters.reused == int((chosen[1:] >= 0).sum(-1)[alike].sum())
    same = (chosen[1:] == chosen[:-1]).all(-1)
    assert same[alike].all()
    assert not same[~alike].all()


def test_by_default_chunks_that_look_nearly_as_good_are_not_copied(llama, long_ids):
    fields = {"budget_ratio": 0.2, "theta": 2.0, "spare_ratio": 0.0, "tokens": (50, 51, 52, 53, 54, 55)}
    indifferent = decode(llama, long_ids, **fields, stay=1.0)
    assert decode(llama, long_ids, **fields).missed_bytes < 0.5 * indifferent.missed_bytes


def test_the_mass_of_the_top_k_is_computed_only_for_policies_that_use_it(llama, long_ids, monkeypatch):
    sorted_blocks = []
    merge = classify.merge_top_k
    monkeypatch.setattr(classify, "merge_top_k", lambda *given: sorted_blocks.append(given) or merge(*given))
    for policy, used in (("hybridkv", False), ("paper", True)):
        sorted_blocks.clear()
        with (
            torch.no_grad(),
            tieredkv.use_attention(llama),
            TieredCache(llama.config, settings({"policy": policy})) as cache,
        ):
            llama(long_ids, **cache_argument(cache))
            assert all((layer.rows.scores is not None) is used for layer in cache.tiered_layers)
        assert bool(sorted_blocks) is used


def test_after_a_change_to_a_policy_with_another_score_the_next_token_is_scored_before_the_seal(llama, long_ids):
    tiers = [settings({"policy": policy, "budget_ratio": 0.5}) for policy in ("hybridkv", "paper")]
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, tiers[0]) as cache:
        llama(long_ids[:, :899], **cache_argument(cache))
        cache.set_tiers(tiers[1])
        got = llama(long_ids[:, 899:], **cache_argument(cache)).logits
        assert not cache.sealed
        llama(long_ids[:, :1], **cache_argument(cache))
        assert cache.sealed
    assert_near(got, llama(long_ids).logits[:, 899:])
