"""A decode plan fits the cap, and the smallest cap that a refusal names works."""

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
from tieredkv.planning import admission, decode_plan, forecast_bytes, host_plan, prefill_plan, sizes
from tieredkv.policy.presets import POLICIES

SHAPE = KVShape(num_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, itemsize=2, hidden_size=64)


@dataclasses.dataclass
class Case:
    tiers: TierConfig
    layout: sizes.Layout
    rows: int
    scores: torch.Tensor
    static: torch.Tensor
    need: torch.Tensor | None
    host_bits: int | None
    """Of a host tier that is there; None: as planned."""

    def plan(self, tiers: TierConfig) -> decode_plan.DecodePlan:
        given = self.scores, self.static, self.need
        host_bits = self.host_bits or host_plan.prompt_bits(SHAPE, tiers, self.layout.tokens)
        return decode_plan.plan_decode(SHAPE, tiers, self.layout, tiers.cap_bytes, *given, host_bits=host_bits)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A prompt, settings, and heads that the policy might find."""
    preset = POLICIES[draw(st.sampled_from([*POLICIES]))]
    policy = dataclasses.replace(
        preset, type_split=draw(st.floats(0.1, 1)), reuse_above=draw(st.sampled_from([0.5, 2.0]))
    )
    tiers = TierConfig(
        gpu_kv_gb=draw(st.floats(1e-6, 2e-3)),
        chunk_tokens=draw(st.sampled_from([1, 8, 16, 32])),
        sink_tokens=draw(st.integers(0, 40)),
        recent_window=draw(st.integers(0, 70)),
        spare_ratio=draw(st.floats(0, 0.9)),
        policy=policy,
        budget_ratio=draw(st.none() | st.floats(0.01, 1)),
        pack_pages=draw(st.booleans()),
        host_kv_bits=draw(st.sampled_from([None, 16, 8, 4])),
        ahead=draw(st.sampled_from([None, True, False])),
    )
    tokens, new = draw(st.integers(1, 3000)), draw(st.integers(1, 100))
    rows = draw(st.integers(1, min(tokens, 80)))
    scores = torch.tensor(draw(st.lists(st.floats(0, 1), min_size=6, max_size=6))).view(3, 2)
    static = scores >= (policy.theta if policy.theta in (0.0, 2.0) else 0.5)
    static[: policy.dense_layers] = True
    need = draw(st.lists(st.integers(0, tokens + 1), min_size=12, max_size=12))
    measured = torch.tensor(need).view(2, 3, 2) if policy.head_score == "coverage" else None
    host_bits = draw(st.sampled_from([None, 16, 8, 4]))
    return Case(tiers, sizes.lay_out(tiers, tokens, rows, new), rows, scores, static, measured, host_bits)


@given(cases())
@settings(max_examples=300, deadline=None)
def test_a_plan_fits_the_cap_or_is_refused(case):
    tiers, layout, static = case.tiers, case.layout, case.static
    try:
        plan = case.plan(tiers)
    except BudgetError:
        assert tiers.cap_bytes < admission.smallest_cap_bytes(SHAPE, tiers, layout, case.rows, case.host_bits)
        return
    assert sum(forecast_bytes.decode_bytes(SHAPE, tiers, plan, static).values()) <= tiers.cap_bytes
    assert (plan.pages[~static] == layout.sink_chunks + plan.slots[~static]).all()
    assert (plan.slots[static] == 0).all()
    if bool((~static).any()) and layout.retrievable:
        assert (plan.selected[~static] >= 1).all()
        assert (plan.selected <= plan.slots).all()
        assert int(plan.slots.max()) <= layout.retrievable


@given(cases())
@settings(max_examples=200, deadline=None)
def test_the_smallest_cap_named_is_enough_and_less_is_refused(case):
    tiers, layout, rows, bits = case.tiers, case.layout, case.rows, case.host_bits
    smallest = admission.smallest_cap_bytes(SHAPE, tiers, layout, rows, bits)
    enough = dataclasses.replace(tiers, gpu_kv_gb=float(as_gib(smallest)))
    admission.check_cap(SHAPE, enough, layout, rows, bits=bits)
    scored = min(rows, tiers.policy.text_window)
    for each in {16, bits or host_plan.prompt_bits(SHAPE, enough, layout.tokens)}:  # 16 until it is packed
        block = prefill_plan.block_tokens(SHAPE, enough, layout.tokens, scored, 0, True, each)
        assert block >= tiers.chunk_tokens
    case.plan(enough)
    less = dataclasses.replace(enough, gpu_kv_gb=(smallest - 1) / GIB)
    with pytest.raises(BudgetError, match="the smallest that works is"):
        admission.check_cap(SHAPE, less, layout, rows, bits=bits)


def test_a_cap_beyond_the_cache_selects_everything_and_ranks_nothing():
    tiers = TierConfig(gpu_kv_gb=1)
    layout = sizes.lay_out(tiers, 1000, 10, 20)
    scores = torch.zeros(3, 2)
    plan = decode_plan.plan_decode(SHAPE, tiers, layout, tiers.cap_bytes, scores, scores >= 0.5, host_bits=16)
    assert (plan.selected == layout.retrievable).all()
    assert not plan.ranked


@pytest.mark.parametrize("theta", [0.0, 0.5, 2.0])
def test_a_quality_budget_is_what_heads_attend_to_on_average(theta):
    tiers = TierConfig(gpu_kv_gb=1, budget_ratio=0.2, policy=dataclasses.replace(POLICIES["hybridkv"], theta=theta))
    layout = sizes.lay_out(tiers, 3000, 10, 20)
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.6], [0.3, 0.7]])
    static = scores >= theta
    plan = decode_plan.plan_decode(SHAPE, tiers, layout, tiers.cap_bytes, scores, static, host_bits=16)
    pages = int(plan.pages[static].sum()) + int((~static).sum()) * layout.sink_chunks + int(plan.selected.sum())
    attended = layout.tokens - layout.recent_start + pages * tiers.chunk_tokens / 6
    assert 0.2 * 3000 - tiers.chunk_tokens < attended <= 0.2 * 3000


def test_with_a_quality_budget_the_spare_share_sets_the_pool():
    def slots(share):
        tiers = TierConfig(gpu_kv_gb=1, budget_ratio=0.2, spare_ratio=share)
        layout, dynamic = sizes.lay_out(tiers, 3000, 10, 20), torch.zeros(3, 2)
        plan = decode_plan.plan_decode(SHAPE, tiers, layout, tiers.cap_bytes, dynamic, dynamic.bool(), host_bits=16)
        return plan.selected.tolist(), plan.slots.tolist()

    (selected, none), (same, half) = slots(0), slots(0.5)
    assert selected == same == none
    assert half == [[2 * count for count in row] for row in selected]
