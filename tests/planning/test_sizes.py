"""The planner: what it grants fits the cap, and the smallest cap it names works."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError
from tieredkv.memory.units import GIB, as_gib, ceil_div
from tieredkv.models.kv_shape import KVShape
from tieredkv.ops.packing import Packing, pack
from tieredkv.planning import decode_plan, sizes

SHAPE = KVShape(num_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, itemsize=2)


def decode_bytes(shape: KVShape, tiers: TierConfig, made: decode_plan.DecodePlan, n_dynamic: int) -> int:
    """What a plan will hold at once while decoding."""
    total = made.pool_pages * sizes.page_bytes(shape, tiers, made.packed)
    total += made.scratch_pages * sizes.scratch_page_bytes(shape, tiers, made.packed)
    total += sizes.table_bytes(shape, tiers, made.layout)
    if made.ranked and n_dynamic:
        total += sizes.digest_bytes(shape, tiers, made.layout, n_dynamic) + sizes.ranking_bytes(
            shape, tiers, made.layout
        )
    return total


@st.composite
def cases(draw: st.DrawFn):
    tiers = TierConfig(
        gpu_kv_gb=draw(st.floats(1e-6, 2e-3)),
        chunk_tokens=draw(st.sampled_from([1, 8, 16, 32])),
        sink_tokens=draw(st.integers(0, 40)),
        recent_window=draw(st.integers(0, 70)),
        spare_ratio=draw(st.floats(0, 0.9)),
        type_split=draw(st.floats(0.1, 1)),
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
        made = decode_plan.plan_decode(SHAPE, tiers, layout, scores, static)
    except BudgetError:
        assert tiers.cap_bytes < sizes.smallest_cap_bytes(SHAPE, tiers, layout, rows)
        return
    n_dynamic = int((~static).sum())
    assert decode_bytes(SHAPE, tiers, made, n_dynamic) <= tiers.cap_bytes
    assert 6 * layout.recent_pages + int(made.pages.sum()) <= made.pool_pages
    assert (made.pages[~static] == layout.sink_chunks + made.slots[~static]).all()
    assert (made.slots[static] == 0).all()
    if n_dynamic and layout.retrievable:
        assert (made.selected[~static] >= 1).all()
        assert (made.selected <= made.slots).all()
        assert int(made.slots.max()) <= layout.retrievable


@given(cases())
@settings(max_examples=200, deadline=None)
def test_the_smallest_cap_named_is_enough_and_less_is_refused(case):
    tiers, tokens, rows, new, scores = case
    layout = sizes.lay_out(tiers, tokens, rows, new)
    smallest = sizes.smallest_cap_bytes(SHAPE, tiers, layout, rows)
    enough = TierConfig(
        gpu_kv_gb=float(as_gib(smallest)),
        **{n: getattr(tiers, n) for n in ("chunk_tokens", "sink_tokens", "recent_window", "spare_ratio", "pack_pages")},
    )
    sizes.check_cap(SHAPE, enough, layout, rows)
    assert (
        sizes.block_tokens(SHAPE, enough, tokens, min(rows, tiers.method.text_window), 0, staged=True)
        >= tiers.chunk_tokens
    )
    decode_plan.plan_decode(SHAPE, enough, layout, scores, scores >= 0.5)
    less = dataclasses.replace(enough, gpu_kv_gb=(smallest - 1) / GIB)
    with pytest.raises(BudgetError, match="the smallest that works is"):
        sizes.check_cap(SHAPE, less, layout, rows)


@given(st.floats(0.05, 3), st.integers(1, 5000), st.integers(1, 64), st.sampled_from([1, 8, 32]))
def test_prefill_holds_no_more_than_the_cap_and_all_of_it_where_it_fits(share, tokens, rows, chunk):
    tiers = TierConfig(gpu_kv_gb=share * tokens * SHAPE.token_bytes / GIB, chunk_tokens=chunk)
    resident = sizes.resident_tokens(SHAPE, tiers, tokens)
    assert resident % chunk == 0
    assert resident * SHAPE.token_bytes <= tiers.cap_bytes
    if resident < tokens:
        assert not resident or sizes.block_tokens(SHAPE, tiers, tokens, 0, resident, staged=True)
    everything = ceil_div(tokens, chunk) * chunk * SHAPE.token_bytes
    both = everything + sizes.scoring_bytes(SHAPE, tiers, tokens, tiers.method.text_window, chunk)
    assert resident >= tokens or both > tiers.cap_bytes
    kept = sizes.resident_beside_scores(SHAPE, tiers, resident, tokens, tokens + rows, rows)
    scored = sizes.block_tokens(SHAPE, tiers, tokens + rows, rows, kept, tokens > kept)
    scratch = sizes.scoring_bytes(SHAPE, tiers, tokens + rows, rows, scored)
    scratch += sizes.staging_bytes(SHAPE, scored) if tokens > kept else 0
    assert not scored or kept * SHAPE.token_bytes + scratch <= tiers.cap_bytes


def test_past_tokens_are_staged_in_blocks_worth_a_copy_and_most_of_the_cap_is_left():
    shape = KVShape(num_layers=28, num_attention_heads=28, num_key_value_heads=4, head_dim=128, itemsize=2)
    tiers, tokens = TierConfig(gpu_kv_gb=2), 200_000
    block = sizes.block_tokens(shape, tiers, tokens, 0, 0, staged=True)
    assert sizes.buffer_bytes(shape, block) >= 2**20
    assert sizes.resident_tokens(shape, tiers, tokens) * shape.token_bytes > 0.9 * tiers.cap_bytes


@given(st.integers(1, 2**45))
def test_gib_text_read_back_is_enough_and_hardly_more(nbytes):
    back = int(float(as_gib(nbytes)) * GIB)
    assert nbytes <= back <= nbytes * 1.011 + 1


def test_a_cap_beyond_the_cache_selects_everything_and_ranks_nothing():
    tiers = TierConfig(gpu_kv_gb=1)
    layout = sizes.lay_out(tiers, 1000, 10, 20)
    scores = torch.zeros(3, 2)
    made = decode_plan.plan_decode(SHAPE, tiers, layout, scores, scores >= 0.5)
    assert (made.selected == layout.retrievable).all()
    assert not made.ranked


@pytest.mark.parametrize("theta", [0.0, 0.5, 2.0])
def test_a_quality_budget_is_what_heads_attend_to_on_average(theta):
    tiers = TierConfig(gpu_kv_gb=1, budget_ratio=0.2, theta=theta)
    layout = sizes.lay_out(tiers, 3000, 10, 20)
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.6], [0.3, 0.7]])
    static = scores >= theta
    made = decode_plan.plan_decode(SHAPE, tiers, layout, scores, static)
    pages = int(made.pages[static].sum()) + int((~static).sum()) * layout.sink_chunks + int(made.selected.sum())
    attended = layout.tokens - layout.recent_start + pages * tiers.chunk_tokens / 6
    assert 0.2 * 3000 - tiers.chunk_tokens < attended <= 0.2 * 3000


def test_with_a_quality_budget_the_spare_share_sets_the_pool():
    def slots(share):
        tiers = TierConfig(gpu_kv_gb=1, budget_ratio=0.2, spare_ratio=share)
        made = decode_plan.plan_decode(
            SHAPE, tiers, sizes.lay_out(tiers, 3000, 10, 20), torch.zeros(3, 2), torch.zeros(3, 2).bool()
        )
        return made.selected.tolist(), made.slots.tolist()

    (selected, none), (same, half) = slots(0), slots(0.5)
    assert selected == same == none
    assert half == [[2 * count for count in row] for row in selected]


def test_the_recent_region_starts_on_a_chunk_and_holds_the_question():
    tiers = TierConfig(chunk_tokens=32, recent_window=8)
    layout = sizes.lay_out(tiers, 1000, 50, 10)
    assert layout.recent_start % 32 == 0
    assert 1000 - layout.recent_start >= 50
    assert layout.recent_pages * 32 >= 1000 - layout.recent_start + 10


def test_a_short_prompt_is_all_recent():
    layout = sizes.lay_out(TierConfig(), 20, 10, 5)
    assert (layout.recent_start, layout.old_chunks, layout.retrievable) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gpu_kv_gb", 0),
        ("gpu_kv_gb", -1),
        ("gpu_kv_gb", float("nan")),
        ("gpu_kv_gb", "4"),
        ("gpu_kv_gb", 1e308),
        ("theta", float("nan")),
        ("theta", "x"),
        ("top_k_ratio", "a"),
        ("budget_ratio", "1"),
        ("chunk_tokens", 0),
        ("chunk_tokens", 3.5),
        ("top_k_ratio", 0),
        ("type_split", 1.5),
        ("spare_ratio", 1.0),
        ("budget_ratio", 0),
        ("saliency_pool", 4),
        ("recent_window", -1),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(BudgetError, match=f"{name}=.* is not valid: give"):
        TierConfig(**{name: value})


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"),
    [(torch.float32, 128, 7), (torch.bfloat16, 32, 2), (torch.bfloat16, 128, 7)],
    ids=str,
)
@pytest.mark.parametrize("batch_pages", [1, 10])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_scratch_counted_covers_what_the_torch_attention_allocates(dtype, head_dim, group, batch_pages, packed):
    """Peak of live bytes inside one call, from torch's own profiler, against the planner's figure."""
    from tieredkv.ops.torch_ops import paged_attention

    tiers = TierConfig(chunk_tokens=32)
    shape = KVShape(1, group, 1, head_dim, dtype.itemsize)
    pages, packing = torch.randn(30, 2, 32, head_dim).to(dtype), None
    if packed:
        norms = torch.ones(1, 2, head_dim)
        pages, scales = pack(pages, norms.unsqueeze(2))
        packing = Packing(scales, norms)
    table, lengths = torch.arange(30).int().view(1, 30), torch.full((1, 30), 32).int()
    query = torch.randn(group, 1, head_dim).to(dtype)
    paged_attention(query, pages, table, lengths, 1.0, batch_pages, packing)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        paged_attention(query, pages, table, lengths, 1.0, batch_pages, packing)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    fixed = 8 * group * head_dim * 4 + 30 * 32  # outputs of the call and of its merges, and the index of used pages
    assert 0 < peak <= batch_pages * sizes.scratch_page_bytes(shape, tiers, packed) + fixed
