"""Which bits the host tier of a prompt has."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tieredkv.cli.options import HostBits
from tieredkv.codecs import CODECS
from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError, OptionError
from tieredkv.memory.units import GIB, HOST_BITS, largest
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning import decode_plan, host_plan, sizes
from tieredkv.planning.forecast import plan

SHAPE = KVShape(num_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, itemsize=2)
ODD = replace(SHAPE, head_dim=15)
AMPLE, TIGHT = 1.0, 0.001
TOKENS = 20_000


def everything(tiers: TierConfig, tokens: int, bits: int, new_tokens: int = 0) -> bool:
    """Whether a decode plan attends to all tokens, in pages of `bits`."""
    layout, static = sizes.lay_out(tiers, tokens, 0, new_tokens), torch.zeros((3, 2), dtype=torch.bool)
    given = tiers.cap_bytes, static.double(), static
    try:
        found = decode_plan.plan_decode(SHAPE, tiers, layout, *given, host_bits=bits)
    except BudgetError:
        return False
    return not found.ranked and found.page_bits == bits


def test_every_codec_can_be_asked_for():
    assert set(HOST_BITS) == CODECS.keys()


@pytest.mark.parametrize("bits", HOST_BITS)
@pytest.mark.parametrize("cap", [AMPLE, TIGHT])
def test_bits_that_are_given_are_used(bits, cap):
    tiers = TierConfig(gpu_kv_gb=cap, host_kv_bits=bits)
    assert host_plan.host_bits(SHAPE, tiers, TOKENS) == bits
    assert host_plan.reason(SHAPE, tiers, TOKENS) == "as given"


def test_by_default_what_stays_on_the_device_whole_is_as_the_model_made_it():
    assert host_plan.host_bits(SHAPE, TierConfig(gpu_kv_gb=AMPLE), TOKENS) == 16
    assert host_plan.host_bits(SHAPE, TierConfig(gpu_kv_gb=TIGHT), TOKENS) == host_plan.DEFAULT_BITS


@given(st.floats(1e-5, 5e-3), st.sampled_from([1, 8, 32]), st.booleans())
def test_the_longest_prompt_of_16_bits_is_the_longest_that_a_plan_attends_to_whole(cap, chunk, adaptive):
    tiers = TierConfig(gpu_kv_gb=cap, chunk_tokens=chunk, adaptive=adaptive)
    longest = largest(lambda tokens: host_plan.host_bits(SHAPE, tiers, tokens) == 16, 100_000)
    if longest:
        assert everything(tiers, longest, 16)
        spare = longest - sizes.QUESTION_ROOM
        assert spare <= 0 or everything(tiers, spare, 16, new_tokens=sizes.QUESTION_ROOM)
    assert not everything(tiers, longest + 1, 16)


def test_a_session_has_room_for_a_question_and_its_answer():
    tiers = TierConfig(gpu_kv_gb=TIGHT)
    longest = largest(lambda tokens: host_plan.prompt_bits(SHAPE, tiers, tokens) == 16, 100_000)
    assert host_plan.host_bits(SHAPE, tiers, longest + sizes.QUESTION_ROOM) == 16
    assert host_plan.host_bits(SHAPE, tiers, longest + sizes.QUESTION_ROOM + 1) < 16


def test_a_step_that_attends_to_less_copies_packed_chunks_however_large_the_cap():
    assert host_plan.host_bits(SHAPE, TierConfig(gpu_kv_gb=AMPLE, budget_ratio=0.5), TOKENS) == host_plan.DEFAULT_BITS
    assert host_plan.host_bits(SHAPE, TierConfig(gpu_kv_gb=AMPLE, budget_ratio=1.0), TOKENS) == 16


@pytest.mark.parametrize("unpacked", [{"policy": "full"}, {"pack_pages": False}], ids=str)
def test_where_pages_are_not_packed_nothing_is_by_default(unpacked):
    tiers = TierConfig(gpu_kv_gb=TIGHT, **unpacked)
    assert host_plan.host_bits(SHAPE, tiers, TOKENS) == 16
    assert host_plan.reason(SHAPE, tiers, TOKENS) == "as pages are not packed"
    assert host_plan.host_bits(SHAPE, replace(tiers, host_kv_bits=8), TOKENS) == 8


def test_host_memory_that_is_too_small_for_16_bits_packs_what_fits_on_the_device():
    whole = sizes.host_bytes(SHAPE, TierConfig(), TOKENS, 16)
    for spare, bits in ((0, 16), (-1, host_plan.DEFAULT_BITS)):
        tiers = TierConfig(gpu_kv_gb=AMPLE, host_kv_gb=(whole + spare) / GIB)
        assert host_plan.prompt_bits(SHAPE, tiers, TOKENS) == bits


def test_4_bits_need_an_even_head_dim():
    with pytest.raises(OptionError, match=r"host_kv_bits=4 stores numbers in pairs, .* have 15: give 8 or 16\."):
        host_plan.host_bits(ODD, TierConfig(host_kv_bits=4), TOKENS)
    assert host_plan.host_bits(ODD, TierConfig(gpu_kv_gb=TIGHT), TOKENS) == 8
    assert host_plan.possible_bits(ODD) == [16, 8]


def test_fewer_bits_are_named_where_they_fit():
    tiers = TierConfig(host_kv_bits=16)
    needs = {bits: sizes.host_bytes(SHAPE, tiers, TOKENS, bits) for bits in HOST_BITS}
    assert host_plan.fewer_bits(SHAPE, tiers, TOKENS, needs[8]) == ["host_kv_bits=8"]
    assert host_plan.fewer_bits(SHAPE, tiers, TOKENS, needs[8] - 1) == ["host_kv_bits=4"]
    assert host_plan.fewer_bits(SHAPE, tiers, TOKENS, needs[4] - 1) == []
    assert host_plan.fewer_bits(ODD, replace(tiers, host_kv_bits=8), TOKENS, needs[16]) == []


def test_the_help_names_the_default():
    _, option = get_args(HostBits)
    assert option.help.endswith(f"[16 if all stay on the device, else {host_plan.DEFAULT_BITS}].")


# ---- plans


def qwen3_5_9b():
    """transformers' default Qwen3.5 has the shape of the model of 9 billion parameters."""
    from transformers import Qwen3_5Config

    return Qwen3_5Config()


def test_an_hour_in_4_bits_is_a_gigabyte_and_stays_on_the_device():
    whole = plan(qwen3_5_9b(), 131_072, gpu_kv_gb=2, host_kv_bits=4)
    assert 1.0 < whole.host_bytes / GIB < 1.35
    assert whole.step_copy_bytes == whole.decode["ranking"] == whole.decode["digests"] == 0
    assert whole.dynamic_tokens == whole.prompt_tokens + whole.new_tokens
    chosen = plan(qwen3_5_9b(), 131_072, gpu_kv_gb=2)
    assert chosen.host_bits == chosen.page_bits == 8
    assert chosen.step_copy_bytes > 0


def test_a_plan_shows_what_each_choice_of_bits_takes_and_why():
    plans = {bits: plan(qwen3_5_9b(), 131_072, gpu_kv_gb=2, host_kv_bits=bits) for bits in (None, *HOST_BITS)}
    choices = {choice.bits: choice for choice in plans[None].bits_choices}
    for bits in HOST_BITS:
        assert plans[bits].host_bits == bits
        assert choices[bits].host_bytes == plans[bits].host_bytes
        assert choices[bits].step_copy_bytes == plans[bits].step_copy_bytes
        assert choices[bits].file_bytes == plans[bits].file_bytes
        assert "  in " in str(plans[bits])
    assert "  in 8 bits       as not all of it stays on the device" in str(plans[None])
    assert "  in 4 bits       as given" in str(plans[4])
    assert "a step copies nothing: all of it stays on the device" in str(plans[None])


def test_the_link_and_the_host_carry_half_and_a_quarter_of_the_bytes():
    sizes_of = {
        bits: plan(qwen3_5_9b(), 131_072, gpu_kv_gb=0.5, budget_ratio=0.1, host_kv_bits=bits) for bits in HOST_BITS
    }
    for of in ("step_copy_bytes", "prefill_copy_bytes"):
        plain = getattr(sizes_of[16], of)
        assert getattr(sizes_of[8], of) <= 0.52 * plain
        assert getattr(sizes_of[4], of) <= 0.29 * plain
