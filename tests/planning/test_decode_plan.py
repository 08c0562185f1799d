"""What is planned for decoding fits the cap, and the smallest cap that is named works."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError
from tieredkv.memory.units import GIB, as_gib
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning import admission, decode_plan, prefill_plan, sizes
from tieredkv.policy.presets import POLICIES

SHAPE = KVShape(num_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, itemsize=2)


def decode_bytes(shape: KVShape, tiers: TierConfig, plan: decode_plan.DecodePlan, n_dynamic: int) -> int:
    """What a plan will hold at once while decoding."""
    pool = plan.pool_pages([*range(shape.num_layers)]) * sizes.page_bytes(shape, tiers, plan.packed)
    scratch = plan.scratch_pages * sizes.scratch_page_bytes(shape, tiers, plan.packed)
    return pool + scratch + sizes.beside_pool_bytes(shape, tiers, plan.layout, n_dynamic if plan.ranked else 0)


@st.composite
def cases(draw: st.DrawFn):
    tiers = TierConfig(
        gpu_kv_gb=draw(st.floats(1e-6, 2e-3)),
        chunk_tokens=draw(st.sampled_from([1, 8, 16, 32])),
        sink_tokens=draw(st.integers(0, 40)),
        recent_window=draw(st.integers(0, 70)),
        spare_ratio=draw(st.floats(0, 0.9)),
        policy=dataclasses.replace(POLICIES["hybridkv"], type_split=draw(st.floats(0.1, 1))),
        budget_ratio=draw(st.none() | st.floats(0.01, 1)),
        pack_pages=draw(st.booleans()),
    )
    tokens, new = draw(st.integers(1, 3000)), draw(st.integers(1, 100))
    rows = draw(st.integers(1, min(tokens, 80)))
    scores = torch.tensor(draw(st.lists(st.floats(0, 1), min_size=6, max_size=6))).view(3, 2)
    return tiers, tokens, rows, new, scores


@given(cases())
@settings(max_examples=300, deadline=None)
def test_a_plan_fits_the_cap_or_is_refused(case):
    tiers, tokens, rows, new, scores = case
    layout = sizes.lay_out(tiers, tokens, rows, new)
    static = scores >= 0.5
    try:
        plan = decode_plan.plan_decode(SHAPE, tiers, layout, tiers.cap_bytes, scores, static)
    except BudgetError:
        assert tiers.cap_bytes < admission.smallest_cap_bytes(SHAPE, tiers, layout, rows)
        return
    n_dynamic = int((~static).sum())
    assert decode_bytes(SHAPE, tiers, plan, n_dynamic) <= tiers.cap_bytes
    assert (plan.pages[~static] == layout.sink_chunks + plan.slots[~static]).all()
    assert (plan.slots[static] == 0).all()
    if n_dynamic and layout.retrievable:
        assert (plan.selected[~static] >= 1).all()
        assert (plan.selected <= plan.slots).all()
        assert int(plan.slots.max()) <= layout.retrievable


@given(cases())
@settings(max_examples=200, deadline=None)
def test_the_smallest_cap_named_is_enough_and_less_is_refused(case):
    tiers, tokens, rows, new, scores = case
    layout = sizes.lay_out(tiers, tokens, rows, new)
    smallest = admission.smallest_cap_bytes(SHAPE, tiers, layout, rows)
    enough = TierConfig(
        gpu_kv_gb=float(as_gib(smallest)),
        **{n: getattr(tiers, n) for n in ("chunk_tokens", "sink_tokens", "recent_window", "spare_ratio", "pack_pages")},
    )
    admission.check_cap(SHAPE, enough, layout, rows)
    scored = min(rows, tiers.policy.text_window)
    assert prefill_plan.block_tokens(SHAPE, enough, tokens, scored, 0, staged=True) >= tiers.chunk_tokens
    decode_plan.plan_decode(SHAPE, enough, layout, enough.cap_bytes, scores, scores >= 0.5)
    less = dataclasses.replace(enough, gpu_kv_gb=(smallest - 1) / GIB)
    with pytest.raises(BudgetError, match="the smallest that works is"):
        admission.check_cap(SHAPE, less, layout, rows)


def test_a_cap_beyond_the_cache_selects_everything_and_ranks_nothing():
    tiers = TierConfig(gpu_kv_gb=1)
    layout = sizes.lay_out(tiers, 1000, 10, 20)
    scores = torch.zeros(3, 2)
    plan = decode_plan.plan_decode(SHAPE, tiers, layout, tiers.cap_bytes, scores, scores >= 0.5)
    assert (plan.selected == layout.retrievable).all()
    assert not plan.ranked


@pytest.mark.parametrize("theta", [0.0, 0.5, 2.0])
def test_a_quality_budget_is_what_heads_attend_to_on_average(theta):
    tiers = TierConfig(gpu_kv_gb=1, budget_ratio=0.2, policy=dataclasses.replace(POLICIES["hybridkv"], theta=theta))
    layout = sizes.lay_out(tiers, 3000, 10, 20)
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.6], [0.3, 0.7]])
    static = scores >= theta
    plan = decode_plan.plan_decode(SHAPE, tiers, layout, tiers.cap_bytes, scores, static)
    pages = int(plan.pages[static].sum()) + int((~static).sum()) * layout.sink_chunks + int(plan.selected.sum())
    attended = layout.tokens - layout.recent_start + pages * tiers.chunk_tokens / 6
    assert 0.2 * 3000 - tiers.chunk_tokens < attended <= 0.2 * 3000


def test_with_a_quality_budget_the_spare_share_sets_the_pool():
    def slots(share):
        tiers = TierConfig(gpu_kv_gb=1, budget_ratio=0.2, spare_ratio=share)
        layout, dynamic = sizes.lay_out(tiers, 3000, 10, 20), torch.zeros(3, 2)
        plan = decode_plan.plan_decode(SHAPE, tiers, layout, tiers.cap_bytes, dynamic, dynamic.bool())
        return plan.selected.tolist(), plan.slots.tolist()

    (selected, none), (same, half) = slots(0), slots(0.5)
    assert selected == same == none
    assert half == [[2 * count for count in row] for row in selected]
