"""The calls of a prefill, and what they hold on the device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tieredkv.config import TierConfig
from tieredkv.memory.units import GIB, ceil_div
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning import prefill_plan, sizes

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


@given(
    st.floats(0.05, 3),
    st.integers(1, 5000),
    st.integers(1, 64),
    st.sampled_from([1, 8, 32]),
    st.sampled_from([16, 8, 4]),
)
def test_prefill_holds_no_more_than_the_cap_and_all_of_it_where_it_fits(share, tokens, rows, chunk, bits):
    tiers = TierConfig(gpu_kv_gb=share * tokens * SHAPE.token_bytes / GIB, chunk_tokens=chunk)
    resident = prefill_plan.resident_tokens(SHAPE, tiers, tokens, bits)
    assert resident % chunk == 0
    assert resident * SHAPE.token_bytes <= tiers.cap_bytes
    if resident < tokens:
        for now in (16, bits):  # before and after the host tier is packed
            assert not resident or prefill_plan.block_tokens(SHAPE, tiers, tokens, 0, resident, True, now)
    everything = ceil_div(tokens, chunk) * chunk * SHAPE.token_bytes
    both = everything + prefill_plan.scoring_bytes(SHAPE, tiers, tokens, tiers.policy.text_window, chunk, bits)
    assert resident >= tokens or both > tiers.cap_bytes
    call = prefill_plan.Call(tokens, tokens + rows, rows)
    kept = prefill_plan.resident_beside_scores(SHAPE, tiers, resident, call, bits)
    scored = prefill_plan.block_tokens(SHAPE, tiers, tokens + rows, rows, kept, tokens > kept, bits)
    scratch = prefill_plan.reading_bytes(SHAPE, tiers, tokens + rows, rows, scored, tokens > kept, bits)
    assert not scored or kept * SHAPE.token_bytes + scratch <= tiers.cap_bytes


def test_beside_a_whole_prompt_there_is_room_to_digest_a_chunk():
    tokens = 1024
    least = tokens * SHAPE.token_bytes + prefill_plan.digesting_bytes(SHAPE, TierConfig(), 1)
    enough, less = (TierConfig(gpu_kv_gb=nbytes / GIB, prefill_chunk=8) for nbytes in (least, least - 1))
    assert prefill_plan.resident_tokens(SHAPE, enough, tokens, 16) == tokens
    assert prefill_plan.resident_tokens(SHAPE, less, tokens, 16) < tokens


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_past_tokens_are_staged_in_blocks_worth_a_copy_and_most_of_the_cap_is_left(bits):
    shape = KVShape(num_layers=28, num_attention_heads=28, num_key_value_heads=4, head_dim=128, itemsize=2)
    tiers, tokens = TierConfig(gpu_kv_gb=2), 200_000
    block = prefill_plan.block_tokens(shape, tiers, tokens, 0, 0, True, bits)
    assert prefill_plan.staged_bytes(shape, tiers, block, bits) >= 2**20
    assert prefill_plan.resident_tokens(shape, tiers, tokens, bits) * shape.token_bytes > 0.9 * tiers.cap_bytes


@pytest.mark.parametrize(("gpu_kv_gb", "block"), [(0.1, 2048), (0.5, 5456), (4, 8192)])
def test_blocks_are_larger_where_reading_them_takes_little_of_the_cap(gpu_kv_gb, block):
    shape = KVShape(num_layers=28, num_attention_heads=28, num_key_value_heads=4, head_dim=128, itemsize=2)
    tiers = TierConfig(gpu_kv_gb=gpu_kv_gb)
    assert prefill_plan.block_tokens(shape, tiers, 200_000, 0, 0, True, 16) == block
    assert prefill_plan.reading_bytes(shape, tiers, 200_000, 0, max(block, 2049), True, 16) <= tiers.cap_bytes / 8


def test_buffers_hold_records_as_they_are_stored_and_one_block_of_keys_and_values():
    tiers, call = TierConfig(gpu_kv_gb=0.01), prefill_plan.Call(10_000, 10_064)
    plain, packed = (prefill_plan.plan_staging(SHAPE, tiers, call, 0, 0, bits) for bits in (16, 4))
    assert plain.staged_bytes == plain.decoded_bytes == prefill_plan.buffer_bytes(SHAPE, plain.block_tokens)
    assert packed.decoded_bytes == prefill_plan.buffer_bytes(SHAPE, packed.block_tokens)
    assert packed.buffers == 2
    assert packed.staged_bytes == packed.block_tokens // 8 * 2 * sizes.chunk_bytes(SHAPE, tiers, 4)


def test_a_single_block_is_staged_to_one_buffer():
    staging = prefill_plan.plan_staging(SHAPE, TierConfig(), prefill_plan.Call(100, 164), 0, 0, 8)
    assert (staging.buffers, staging.block_tokens) == (1, 104)
    resident = prefill_plan.plan_staging(SHAPE, TierConfig(), prefill_plan.Call(100, 164), 100, 104, 8)
    assert resident.nbytes == 0
