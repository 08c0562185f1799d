"""The budget knows the link: a step attends to no more than may be copied, and to no less than the floor."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tieredkv.config import TierConfig
from tieredkv.memory.units import largest
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning import decode_plan, sizes
from tieredkv.planning.ahead_time import Waits
from tieredkv.planning.misses import choosing_works, total_wait
from tieredkv.planning.rates import Rates
from tieredkv.planning.step_time import Work
from tieredkv.planning.step_works import step_waits
from tieredkv.policy.presets import POLICIES

SHAPE = KVShape(num_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, itemsize=2)
TOKENS = 30_000
RATES = Rates.of(1000, 0.5)


def planned(waits: Waits | None, shape: KVShape = SHAPE, static=None, need=None, **options) -> decode_plan.DecodePlan:
    tiers = TierConfig(**{"gpu_kv_gb": 6e-3, **options})
    layout = sizes.lay_out(tiers, TOKENS, 10, 20)
    static = torch.zeros(3, 2, dtype=torch.bool) if static is None else static
    given = static.double(), static, need
    return decode_plan.plan_decode(shape, tiers, layout, tiers.cap_bytes, *given, host_bits=8, waits=waits)


def waits_ms(plan: decode_plan.DecodePlan, shape: KVShape = SHAPE, rates: Rates = RATES) -> float:
    return total_wait(works(plan, shape), rates).total


def works(plan: decode_plan.DecodePlan, shape: KVShape = SHAPE) -> list[Work]:
    static = torch.zeros(3, 2, dtype=torch.bool)
    return choosing_works(shape, TierConfig(), plan.layout, static, plan.selected, plan.slots, 8)


FREE = waits_ms(planned(None))


def test_a_step_attends_to_as_much_as_may_be_copied():
    free, tight = planned(None), planned(Waits(0.5 * FREE, RATES))
    assert (free.bound, tight.bound) == ("memory", "link")
    assert waits_ms(tight) <= 0.5 * FREE < waits_ms(replace(tight, selected=tight.selected + 2))
    assert torch.equal(tight.slots, free.slots)  # what is not selected is spare
    assert torch.equal(tight.pages, free.pages)
    assert tight.ranked


def test_where_copies_are_fast_enough_nothing_changes():
    for waits in (Waits(FREE, RATES), Waits(3 * 0.03, Rates.of(1000, 1e9)), Waits(math.inf, RATES)):
        wide = planned(waits)
        assert wide.bound == "memory"
        assert torch.equal(wide.selected, planned(None).selected)


def test_no_less_is_attended_to_than_a_budget_of_a_twentieth_gives():
    floor = planned(None, budget_ratio=decode_plan.FLOOR_RATIO)
    bound = planned(Waits(0, RATES))
    assert bound.bound == "floor"
    assert torch.equal(bound.selected, floor.selected)
    assert bool((bound.slots > floor.slots).all())


def test_a_cap_with_less_than_the_floor_is_the_limit():
    smallest = planned(None, gpu_kv_gb=2.49e-3, spare_ratio=0.8)
    assert bool((smallest.selected < planned(None, budget_ratio=0.05).selected).all())
    bound = planned(Waits(0, RATES), gpu_kv_gb=2.49e-3, spare_ratio=0.8)
    assert torch.equal(bound.selected, smallest.selected)
    assert bound.bound == "memory"


def test_a_given_budget_is_kept_and_everything_stays_everything():
    given = planned(Waits(0, RATES), budget_ratio=0.2)
    assert (given.bound, given.selected.tolist()) == ("budget_ratio", planned(None, budget_ratio=0.2).selected.tolist())
    whole = planned(Waits(0, RATES), gpu_kv_gb=1)
    assert (whole.bound, whole.ranked) == ("nothing", False)
    assert bool((whole.selected == whole.layout.retrievable).all())


def test_static_heads_keep_what_they_have():
    static = torch.tensor([[True, False], [True, True], [False, False]])
    need = torch.full((2, 3, 2), 900)
    free, tight = (planned(waits, static=static, need=need) for waits in (None, Waits(0, RATES)))
    assert torch.equal(tight.pages, free.pages)
    assert bool((tight.selected[~static] < free.selected[~static]).all())
    assert planned(Waits(0, RATES), static=torch.ones_like(static)).bound == "memory"


def test_readers_of_the_last_layer_copy_too():
    shared = replace(SHAPE, readers=3)
    alone, beside = planned(None), planned(None, shape=shared)
    own, read = works(alone), works(beside, shared)
    assert read[:-1] == own[:-1]
    assert read[-1].missed_bytes == pytest.approx(4 * own[-1].missed_bytes)


@given(st.floats(0, 2), st.floats(0, 2), st.floats(0.5, 100))
@settings(max_examples=60, deadline=None)
def test_more_time_or_a_faster_link_never_attends_to_less(ms, more, factor):
    one = planned(Waits(ms, RATES))
    for wider in (Waits(ms + more, RATES), Waits(ms, Rates.of(1000, 0.5 * max(1.0, factor)))):
        assert bool((planned(wider).selected >= one.selected).all())


@given(st.lists(st.floats(0, 10), min_size=2, max_size=300), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_a_search_finds_what_a_bisection_finds_in_at_most_twice_its_tries(rises, share):
    values, tries = [0.0, *accumulate(rises)], []
    limit, last = share * values[-1], len(values) - 1

    def value(place: int) -> float:
        tries.append(place)
        return values[place]

    found = decode_plan.last_within(value, limit, (0, 0.0), (last, values[-1])) if limit < values[-1] else last
    assert found == largest(lambda place: values[place] <= limit, last)
    assert len(tries) <= 2 * last.bit_length()


def test_waits_that_rise_evenly_take_few_tries():
    tries = []
    decode_plan.last_within(lambda place: tries.append(place) or 0.1 * place, 123.4, (0, 0.0), (4096, 409.6))
    assert len(tries) <= 5


def test_the_limit_is_a_share_of_the_models_own_time():
    one, two = (step_waits(SHAPE, TierConfig(step_overhead=share), 10**9, RATES) for share in (0.1, 0.2))
    assert two.limit_ms == pytest.approx(2 * one.limit_ms)
    assert one.limit_ms > 0.1 * 10**9 / 800 / 1e6
    assert step_waits(SHAPE, TierConfig(step_overhead=None), 10**9, RATES).limit_ms == math.inf
    assert step_waits(SHAPE, TierConfig(budget_ratio=0.1), 10**9, RATES).limit_ms == math.inf


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_has_a_plan_under_a_limit(policy):
    preset = POLICIES[policy]
    static = torch.full((3, 2), preset.theta <= 0)
    static[: preset.dense_layers] = True
    if preset.keep_all:
        return
    plan = planned(Waits(0, RATES), static=static, policy=policy, gpu_kv_gb=9e-3)
    assert bool((plan.selected <= plan.slots).all())
    assert bool((plan.selected[~static] >= 1).all())
