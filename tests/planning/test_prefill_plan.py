"""The calls of a prefill, and what they hold on the device."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tieredkv.config import TierConfig
from tieredkv.memory.units import GIB, ceil_div
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning import prefill_plan

SHAPE = KVShape(num_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, itemsize=2)


@given(st.integers(1, 500), st.integers(0, 2000), st.integers(1, 2000))
def test_calls_follow_each_other_and_the_last_is_full_and_scored(size, context, asked):
    tiers = TierConfig(prefill_chunk=size)
    question = prefill_plan.question_calls(tiers, context, context + asked)
    calls = [*prefill_plan.context_calls(context, size), *question]
    ends = [0, *(call.stop for call in calls)]
    assert [call.begin for call in calls] == ends[:-1]
    assert ends[-1] == context + asked
    assert all(0 < call.stop - call.begin <= size for call in calls)
    assert question[-1].stop - question[-1].begin == min(asked, size)
    assert [call.rows for call in calls[:-1]] == [0] * (len(calls) - 1)
    assert calls[-1].rows == min(asked, size, tiers.policy.text_window)


@given(st.floats(0.05, 3), st.integers(1, 5000), st.integers(1, 64), st.sampled_from([1, 8, 32]))
def test_prefill_holds_no_more_than_the_cap_and_all_of_it_where_it_fits(share, tokens, rows, chunk):
    tiers = TierConfig(gpu_kv_gb=share * tokens * SHAPE.token_bytes / GIB, chunk_tokens=chunk)
    resident = prefill_plan.resident_tokens(SHAPE, tiers, tokens)
    assert resident % chunk == 0
    assert resident * SHAPE.token_bytes <= tiers.cap_bytes
    if resident < tokens:
        assert not resident or prefill_plan.block_tokens(SHAPE, tiers, tokens, 0, resident, staged=True)
    everything = ceil_div(tokens, chunk) * chunk * SHAPE.token_bytes
    both = everything + prefill_plan.scoring_bytes(SHAPE, tiers, tokens, tiers.policy.text_window, chunk)
    assert resident >= tokens or both > tiers.cap_bytes
    kept = prefill_plan.resident_beside_scores(SHAPE, tiers, resident, prefill_plan.Call(tokens, tokens + rows, rows))
    scored = prefill_plan.block_tokens(SHAPE, tiers, tokens + rows, rows, kept, tokens > kept)
    scratch = prefill_plan.reading_bytes(SHAPE, tiers, tokens + rows, rows, scored, tokens > kept)
    assert not scored or kept * SHAPE.token_bytes + scratch <= tiers.cap_bytes


def test_beside_a_whole_prompt_there_is_room_to_digest_a_chunk():
    tokens = 1024
    least = tokens * SHAPE.token_bytes + prefill_plan.digesting_bytes(SHAPE, TierConfig(), 1)
    enough, less = (TierConfig(gpu_kv_gb=nbytes / GIB, prefill_chunk=8) for nbytes in (least, least - 1))
    assert prefill_plan.resident_tokens(SHAPE, enough, tokens) == tokens
    assert prefill_plan.resident_tokens(SHAPE, less, tokens) < tokens


def test_past_tokens_are_staged_in_blocks_worth_a_copy_and_most_of_the_cap_is_left():
    shape = KVShape(num_layers=28, num_attention_heads=28, num_key_value_heads=4, head_dim=128, itemsize=2)
    tiers, tokens = TierConfig(gpu_kv_gb=2), 200_000
    block = prefill_plan.block_tokens(shape, tiers, tokens, 0, 0, staged=True)
    assert prefill_plan.buffer_bytes(shape, block) >= 2**20
    assert prefill_plan.resident_tokens(shape, tiers, tokens) * shape.token_bytes > 0.9 * tiers.cap_bytes
