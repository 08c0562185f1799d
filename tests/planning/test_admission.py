"""The memory check: what it measures before a video is ingested, and before a question is asked."""

from __future__ import annotations

import pytest

from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError
from tieredkv.memory import limits
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning import sizes
from tieredkv.planning.admission import Request, check_memory

SHAPE = KVShape(num_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, itemsize=2)
REQUEST = Request(tokens=5000, question_tokens=40, new_tokens=20)


@pytest.fixture
def machine(monkeypatch):
    """`machine(nbytes)`: set the available host memory."""

    def set_available(nbytes):
        monkeypatch.setattr(limits, "available_host_bytes", lambda: nbytes)

    set_available(GIB)
    return set_available


def test_what_fits_is_laid_out(machine):
    tiers = TierConfig()
    assert check_memory(SHAPE, tiers, REQUEST) == sizes.lay_out(tiers, 5000, 40, 20)


def test_a_cap_below_the_smallest_is_refused_before_host_memory_is_checked(machine):
    machine(0)
    with pytest.raises(BudgetError, match=r"the smallest that works is .*\. Raise it, or ask less\."):
        check_memory(SHAPE, TierConfig(gpu_kv_gb=1e-6), REQUEST, "ask less")


@pytest.mark.parametrize(("given", "bits", "ways"), [(None, 8, "4 or host_kv_gb"), (16, 16, "8 or host_kv_gb")])
def test_without_a_cache_the_host_must_hold_all_of_it_or_have_fewer_bits(machine, given, bits, ways):
    tiers = TierConfig(gpu_kv_gb=0.001, host_kv_bits=given)
    needed = sizes.host_bytes(SHAPE, tiers, 5000, bits)
    check_memory(SHAPE, tiers, REQUEST, available=int(needed / limits.SAFE_SHARE) + 1)
    with pytest.raises(
        BudgetError, match=rf"the cache of 5,000 tokens needs .*: lower .*max_frames, or give host_kv_bits={ways}="
    ):
        check_memory(SHAPE, tiers, REQUEST, available=int(needed / limits.SAFE_SHARE) - 1)


def test_a_cache_with_room_takes_no_more(machine):
    machine(0)
    check_memory(SHAPE, TierConfig(), REQUEST, room=5000, room_bytes=1)


def test_fewer_bits_are_not_named_where_they_are_too_many(machine):
    with pytest.raises(BudgetError, match="max_frames, or give host_kv_gb="):
        check_memory(SHAPE, TierConfig(gpu_kv_gb=0.001), REQUEST, available=1000)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_cache_that_must_grow_is_counted_with_what_it_holds_in_its_own_bits(machine, bits):
    tiers = TierConfig(host_kv_gb=1)
    needed = 5000 // 8 * SHAPE.kv_heads * sizes.chunk_bytes(SHAPE, tiers, bits)
    room = {"room": 4000, "room_bytes": 1000, "bits": bits}
    check_memory(SHAPE, tiers, REQUEST, "", "ask less", **room, available=needed - 1000)
    with pytest.raises(BudgetError, match=r"the cache of the video and a question of 40 tokens needs .*: ask less"):
        check_memory(SHAPE, tiers, REQUEST, "", "ask less", **room, available=needed - 1001)


def test_one_memory_must_hold_both_tiers(machine):
    tiers = TierConfig(gpu_kv_gb=0.001, host_kv_gb=1)
    both = sizes.host_bytes(SHAPE, tiers, 5000, 8) + tiers.cap_bytes
    machine(both)
    check_memory(SHAPE, tiers, REQUEST, one_memory=True)
    machine(both - 1)
    check_memory(SHAPE, tiers, REQUEST)
    with pytest.raises(BudgetError, match="with the device tier in the same memory"):
        check_memory(SHAPE, tiers, REQUEST, one_memory=True)
