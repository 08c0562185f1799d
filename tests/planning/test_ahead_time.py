"""What copies ahead hide and cost, and that budget, plan and tables say the same of it."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TEXT_CONFIGS, text_config
from hypothesis import given, settings
from hypothesis import strategies as st

from tieredkv.config import TierConfig
from tieredkv.models.kv_shape import KVShape, model_shape
from tieredkv.planning import ahead_time, decode_plan, forecast_bytes, sizes
from tieredkv.planning.ahead_time import SHARES, USUAL, Lead, Waits, ahead_share, copying, foreseen_share, layer_wait
from tieredkv.planning.decode_plan import DecodePlan, plan_decode
from tieredkv.planning.forecast import plan
from tieredkv.planning.misses import choosing_works, total_wait
from tieredkv.planning.rates import GATHER_US, LAUNCH_US, LINK_SHARE, MODEL_LAUNCH_US, Rates, copy_ms, ranking_ms
from tieredkv.planning.step_time import step_time
from tieredkv.planning.step_works import step_waits, step_works
from tieredkv.planning.weight_bytes import Weights

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SHAPE = KVShape(
    num_layers=28, num_attention_heads=28, num_key_value_heads=4, head_dim=128, itemsize=2, hidden_size=3584
)
RATES = Rates.of(1008, 25)
LEAD = Lead(weight_bytes=440e6, query_bytes=25_690_112, correction_bytes=917_632)
"""Of Qwen2.5-7B."""
LEADS = (None, *[LEAD] * 27)
WEIGHTS = 14_140_000_000
TOKENS = 131_072
DYNAMIC = torch.zeros((28, 4), dtype=torch.bool)
DIGESTS = {"digest_bytes": 16_900_000, "chunks": 16_384, "slots": 1018}


def wait(missed: float, lead: Lead | None = LEAD, spare: float = 0.5, rates: Rates = RATES) -> ahead_time.Wait:
    return layer_wait(missed, **DIGESTS, spare=spare, lead=lead, rates=rates)


def test_without_a_lead_a_layer_waits_for_all_that_is_missing():
    assert wait(1e6, None) == ahead_time.Wait(GATHER_US / 1e3 + 1 / (LINK_SHARE * 25))


def test_what_is_foreseen_is_hidden_and_the_rest_is_exposed():
    long = replace(LEAD, weight_bytes=1e10)
    part = wait(1e7, long)
    assert part.hidden == pytest.approx(copy_ms(ahead_share(USUAL) * 1e7, RATES))
    assert part.exposed == pytest.approx(copy_ms((1 - foreseen_share(0.5)) * 1e7, RATES))
    assert part.exposed < wait(1e7, None).exposed


def test_no_more_is_hidden_than_the_lead_has_time_for():
    """What of the second stream's work is not over when the layer begins is waited for."""
    lead_ms = LEAD.weight_bytes / RATES.weights_gb_s / 1e6 + ahead_time.LEAD_LAUNCHES * MODEL_LAUNCH_US / 1e3
    left = lead_ms - ranking_ms(**DIGESTS, rates=RATES) - (6 * LAUNCH_US + 16 * MODEL_LAUNCH_US) / 1e3
    left -= (LEAD.query_bytes + LEAD.correction_bytes) / RATES.weights_gb_s / 1e6
    for missed in (1e5, 1e6, 5e6, 1e7, 1e8, 1e9):
        part, copied = wait(missed), copy_ms(ahead_share(USUAL) * missed, RATES)
        assert part.hidden == pytest.approx(min(copied, left))
        assert part.exposed == pytest.approx(copy_ms((1 - foreseen_share(0.5)) * missed, RATES) + copied - part.hidden)


def test_a_lead_too_short_for_ranking_hides_nothing_and_delays():
    part = wait(1e6, replace(LEAD, weight_bytes=0))
    assert part.hidden == 0
    assert part.exposed > wait(1e6, None).exposed


def test_a_prediction_delays_the_model_by_what_it_reads_of_the_memory():
    read = LEAD.query_bytes + LEAD.correction_bytes + 16_900_000
    assert wait(1e6).prediction == pytest.approx(read / RATES.memory_gb_s / 1e6)
    assert wait(1e6).total == pytest.approx(wait(1e6).prediction + wait(1e6).exposed)


@given(st.floats(0, 1e8), st.floats(0, 1e8), st.floats(0, 1), st.floats(0, 1e10), st.floats(1, 4))
@settings(max_examples=200, deadline=None)
def test_more_misses_wait_longer_and_a_longer_lead_a_faster_link_or_more_spare_slots_less(
    missed, more, spare, longer, faster
):
    one = wait(missed, spare=spare)
    assert wait(missed + more, spare=spare).exposed >= one.exposed - 1e-9
    assert wait(missed, replace(LEAD, weight_bytes=LEAD.weight_bytes + longer), spare).exposed <= one.exposed + 1e-9
    assert wait(missed, spare=spare, rates=Rates.of(1008, 25 * faster)).exposed <= one.exposed + 1e-9
    assert wait(missed, spare=min(1.0, spare * faster)).exposed <= one.exposed + 1e-9


@pytest.mark.parametrize("per_cent", SHARES)
def test_the_assumed_shares_are_no_better_than_those_of_the_record(per_cent):
    """Of steps counted with SmolLM2, of whose 30 layers the first is not predicted, at every share of spare slots."""
    rows = json.loads((RESULTS / "ahead.json").read_text())["rows"]
    rows = [row for row in rows if (row["model"], row["how"]) == ("smollm2", "steps, copied ahead")]
    rows = [row for row in rows if row["factor"] == per_cent / 100]
    assert {(row["spare"], row["budget"]) for row in rows} == {(a, b) for a in (0.1, 0.2, 0.4) for b in (0.05, 0.1)}
    for spare in (0.1, 0.2, 0.4):
        measured = [row["exposed"] for row in rows if row["spare"] == spare]
        copied = [row["copied"] - row["exposed"] for row in rows if row["spare"] == spare]
        exposed = 1 / 30 + 29 / 30 * (1 - foreseen_share(spare, per_cent))
        assert sum(measured) / len(measured) <= exposed <= sum(measured) / len(measured) + 0.05
        assert sum(copied) / len(copied) == pytest.approx(29 / 30 * ahead_share(per_cent), abs=0.3)


# ---- what the plan decides


def decided(waits: Waits | None, **options) -> DecodePlan:
    tiers = TierConfig(**{"gpu_kv_gb": 2, "host_kv_bits": 8, **options})
    layout = sizes.lay_out(tiers, TOKENS, 32, 64)
    given = DYNAMIC.double(), DYNAMIC
    return plan_decode(SHAPE, tiers, layout, tiers.cap_bytes, *given, host_bits=8, waits=waits)


def known(link: float = 25, leads=LEADS, card: float = 1008, **options) -> Waits:
    return step_waits(SHAPE, TierConfig(**{"gpu_kv_gb": 2, **options}), WEIGHTS, Rates.of(card, link), leads)


def test_on_where_a_step_may_then_attend_to_more():
    wide = {"step_overhead": 0.3}
    on, off = decided(known(**wide), **wide), decided(known(**wide), **wide, ahead=False)
    assert (on.ahead, on.why_ahead, on.bound) == (True, "more", "link")
    assert on.selected.sum() > off.selected.sum()
    assert (off.ahead, off.why_ahead) == (False, "declined")


def test_off_where_a_step_would_attend_to_less():
    tight = {"step_overhead": 0.1}
    found, forced = decided(known(56, **tight), **tight), decided(known(56, **tight), **tight, ahead=True)
    assert (found.ahead, found.why_ahead, forced.why_ahead) == (False, "longer", "asked")
    assert forced.selected.sum() < found.selected.sum()
    assert torch.equal(found.selected, decided(known(56, **tight), **tight, ahead=False).selected)


@pytest.mark.parametrize("options", [{"budget_ratio": 0.1}, {"step_overhead": None, "spare_ratio": 0.7}], ids=str)
def test_without_a_limit_on_where_the_step_is_shorter_and_off_where_not(options):
    slow, fast = (decided(known(link, **options), **options) for link in (25, 1000))
    assert (slow.why_ahead, fast.why_ahead) == ("shorter", "longer")
    for chosen, link in ((slow, 25), (fast, 1000)):
        forced = [decided(known(link, **options), **options, ahead=ahead) for ahead in (True, False)]
        times = [timed(each, link, **options).total for each in forced]
        assert (times[0] < times[1]) is chosen.ahead
        assert torch.equal(chosen.selected, forced[not chosen.ahead].selected)


def test_what_is_not_selected_of_the_slots_is_spare():
    found = decided(known(step_overhead=0.3), step_overhead=0.3)
    work = choosing_works(SHAPE, TierConfig(), found.layout, DYNAMIC, found.selected, found.slots, 8)[5]
    assert work.spare == pytest.approx(1 - float(found.selected[5].sum() / found.slots[5].sum()))
    assert work.spare > TierConfig().spare_ratio  # the link leaves more


def copied_by(found: DecodePlan) -> tuple[Lead | None, ...]:
    return copying(LEADS, found.ahead_per_cent)


def test_as_many_are_copied_ahead_as_the_lead_has_time_for():
    """Where it is short, fewer, of which more are needed: a step is then shorter than with the usual number."""
    short = tuple(lead and replace(lead, weight_bytes=lead.weight_bytes / 4) for lead in LEADS)
    ratio = {"budget_ratio": 0.1}
    long_lead, short_lead = (decided(known(leads=leads, **ratio), **ratio, ahead=True) for leads in (LEADS, short))
    assert long_lead.ahead_per_cent == USUAL > short_lead.ahead_per_cent
    waits = {
        per_cent: total_wait(
            choosing_works(
                SHAPE, TierConfig(), short_lead.layout, DYNAMIC, short_lead.selected, short_lead.slots, 8,
                copying(short, per_cent),
            ),
            Rates.of(1008, 25),
        ).total
        for per_cent in SHARES
    }  # fmt: skip
    assert min(waits, key=waits.get) == short_lead.ahead_per_cent


@pytest.mark.parametrize("link", [3, 25])
def test_a_plan_tries_few_selections(monkeypatch, link):
    """A question waits for it."""
    tries = []

    def counted(*given):
        tries.append(given)
        return total_wait(*given)

    monkeypatch.setattr(decode_plan, "total_wait", counted)
    assert decided(known(link, step_overhead=0.3), step_overhead=0.3).ahead
    assert len(tries) < 40


def timed(found: DecodePlan, link: float, **options):
    tiers = TierConfig(**{"gpu_kv_gb": 2, "host_kv_bits": 8, **options})
    return step_time(step_works(SHAPE, tiers, found, DYNAMIC, 8, WEIGHTS, leads=LEADS), Rates.of(1008, link))


def test_off_where_corrections_take_the_room_of_what_is_attended_to():
    """However much shorter the step would be. Here it attends to a fifth less."""
    tight = {"budget_ratio": 0.05, "gpu_kv_gb": 0.62}
    found, forced = decided(known(11.3, **tight), **tight), decided(known(11.3, **tight), **tight, ahead=True)
    assert (found.why_ahead, forced.why_ahead, found.bound) == ("longer", "asked", "memory")
    assert forced.selected.sum() < 0.9 * found.selected.sum()


def test_as_much_at_the_least_share_on_if_shorter():
    none = {"step_overhead": 0.0}
    found = decided(known(11.3, **none), **none)
    assert (found.why_ahead, found.bound) == ("shorter", "floor")
    assert torch.equal(found.selected, decided(known(11.3, **none), **none, ahead=False).selected)


def test_off_where_nothing_is_ranked_nothing_is_known_or_nothing_is_predicted():
    ratio = {"budget_ratio": 0.1}
    assert decided(known(**ratio), **ratio).ahead
    for waits, options, why in (
        (known(), {"gpu_kv_gb": 5}, "unranked"),
        (known(**ratio), ratio | {"prefetch": False}, "prefetch"),
        (known(**ratio), ratio | {"policy": replace(TierConfig().policy, reuse_above=0.9)}, "reuse"),
        (None, ratio, "unknown"),
        (known(leads=(), **ratio), ratio, "unknown"),
        (known(leads=(None,) * 28, **ratio), ratio, "unpredicted"),
        (replace(known(**ratio), on_disk=True), ratio, "disk"),
    ):
        assert (decided(waits, **options).why_ahead, decided(waits, **options).ahead) == (why, False)


@pytest.mark.parametrize("waits", [None, known(leads=()), known()], ids=["unknown", "a CPU's", "a card's"])
def test_true_and_false_are_obeyed(waits):
    assert [decided(waits, ahead=ahead).why_ahead for ahead in (True, False)] == ["asked", "declined"]
    assert decided(waits, ahead=True, gpu_kv_gb=5).why_ahead == "unranked"


def test_a_model_without_predictions_copies_nothing_ahead_though_asked():
    assert decided(known(leads=(None,) * 28), ahead=True).why_ahead == "unpredicted"


@pytest.mark.parametrize(
    ("waits", "layers"), [(known(step_overhead=None), 27), (None, 28)], ids=["a card's", "unknown"]
)
def test_what_predictions_keep_on_the_device_is_taken_from_the_slots(waits, layers):
    free = {"step_overhead": None}
    on, off = (decided(waits, **free, ahead=ahead) for ahead in (True, False))
    assert (on.ahead_bytes, off.ahead_bytes) == (layers * LEAD.correction_bytes, 0)
    saved = int((off.pages - on.pages).sum()) * sizes.page_bytes(SHAPE, TierConfig(gpu_kv_gb=2), 8)
    assert saved == pytest.approx(on.ahead_bytes, rel=0.02)


def test_the_plan_counts_what_predictions_keep_among_the_tables():
    tiers, found = TierConfig(gpu_kv_gb=2), decided(None, step_overhead=None, ahead=True)
    without = replace(found, ahead_bytes=0)
    on, off = (forecast_bytes.decode_bytes(SHAPE, tiers, each, DYNAMIC)["tables"] for each in (found, without))
    assert on - off == 28 * LEAD.correction_bytes


def test_a_session_that_certainly_copies_ahead_is_larger_by_its_corrections():
    on, left_open, off = (
        sizes.stored_bytes(SHAPE, TierConfig(ahead=ahead), TOKENS, 8) for ahead in (True, None, False)
    )
    assert (on - off, left_open - off) == (28 * LEAD.correction_bytes, 0)


def test_predictions_that_do_not_fit_beside_the_least_are_left_out():
    layout = sizes.lay_out(TierConfig(), TOKENS, 32, 64)
    least = sizes.smallest_decode_bytes(SHAPE, TierConfig(host_kv_bits=8), layout, 8) / 2**30 + 0.001
    assert decided(None, ahead=True, gpu_kv_gb=least).why_ahead == "room"
    assert decided(None, ahead=True, gpu_kv_gb=least + 0.05).why_ahead == "asked"


def test_the_limit_covers_what_is_exposed_and_what_predicting_costs():
    wide = {"step_overhead": 0.3}
    waits, found = known(**wide), decided(known(**wide), **wide)
    works = choosing_works(SHAPE, TierConfig(), found.layout, DYNAMIC, found.selected, found.slots, 8, copied_by(found))
    total = total_wait(works, waits.rates)
    assert 0.99 * waits.limit_ms < total.total <= waits.limit_ms
    assert total.prediction > 0.2 * waits.limit_ms


@pytest.mark.parametrize("options", [{"step_overhead": 0.3}, {"budget_ratio": 0.1}], ids=str)
def test_budget_and_step_say_the_same(options):
    found, waits = decided(known(**options), **options), known(**options)
    step = timed(found, 25, **options)
    works = choosing_works(SHAPE, TierConfig(), found.layout, DYNAMIC, found.selected, found.slots, 8, copied_by(found))
    total = total_wait(works, waits.rates)
    assert found.ahead
    assert (step.link, step.prediction, step.hidden) == pytest.approx((total.exposed, total.prediction, total.hidden))
    parts = step.weights + step.attention + step.ranking + step.launches
    assert step.total == pytest.approx(parts + total.exposed + total.prediction)


# ---- of published and small models


def test_the_lead_is_an_mlp_a_norm_and_three_projections():
    config = text_config("llama")
    hidden, inner, d = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    first, second, third = Weights.of(config, torch.bfloat16).leads()
    assert first is None
    assert second == third
    query = 2 * hidden * config.num_attention_heads * d
    others = 2 * 2 * hidden * config.num_key_value_heads * d
    assert second.query_bytes == query
    assert second.weight_bytes == 3 * 2 * hidden * inner + 2 * 2 * hidden + query + others


@pytest.mark.parametrize("kind", sorted(TEXT_CONFIGS))
def test_leads_are_those_of_layers_that_are_predicted(kind):
    config = text_config(kind)
    leads = Weights.of(config, torch.bfloat16).leads()
    shape = model_shape(config, torch.bfloat16)
    assert len(leads) == shape.num_layers
    assert (leads[-1] is None) or not shape.readers
    for lead in leads:
        assert lead is None or 0 < lead.query_bytes < lead.weight_bytes


def test_of_experts_a_lead_has_those_that_a_token_is_routed_to():
    sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
    try:
        import make_tables
    finally:
        sys.path.pop(0)
    config = make_tables.video_config("Qwen3.6-35B-A3B")
    lead = Weights.of(config, torch.bfloat16).leads()[0]  # preceded by three layers of linear attention
    text = config.get_text_config()
    width, inner, queries = text.hidden_size, text.moe_intermediate_size, text.num_attention_heads * text.head_dim
    routed = text.num_experts_per_tok * 3 * 2 * width * inner
    shared = 3 * 2 * width * text.shared_expert_intermediate_size + 2 * width
    inputs = 2 * 2 * width * queries + 2 * 2 * width * text.num_key_value_heads * text.head_dim  # queries have a gate
    router_and_norms = 2 * width * text.num_experts + 2 * 2 * width + 2 * 2 * text.head_dim
    assert lead.query_bytes == 2 * 2 * width * queries
    assert lead.weight_bytes == routed + shared + inputs + router_and_norms


def test_a_lead_after_a_convolution_is_an_mlp_and_what_its_own_layer_reads_until_the_query():
    config = text_config("lfm2")
    hidden, inner, d = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    inputs = 2 * hidden * (config.num_attention_heads + 2 * config.num_key_value_heads) * d + 2 * 2 * d
    for lead in Weights.of(config, torch.bfloat16).leads():
        assert lead.weight_bytes == 3 * 2 * hidden * inner + 2 * 2 * hidden + inputs


def test_what_is_copied_is_what_is_missing_without_the_foreseen_and_all_that_is_copied_ahead():
    assert ahead_time.copied_bytes(1e6, 0.5, None) == 1e6
    late = 1 - foreseen_share(0.5)
    assert ahead_time.copied_bytes(1e6, 0.5, LEAD) == pytest.approx(1e6 * (late + ahead_share(USUAL)))


def test_the_plan_of_a_card_says_what_is_ahead_and_what_it_hides(qwen_7b):
    found = plan(qwen_7b, TOKENS, gpu_kv_gb=2, card="RTX 4090", budget_ratio=0.1)
    step, text = found.step, str(found)
    assert (step.ahead, step.predicted_layers, step.copied_bytes > step.missed_bytes) == (True, 27, True)
    assert f"copies ahead      on, for a shorter step: {sizes_text(step.copied_bytes)} in all; " in text
    assert f"{step.time.hidden:.2f} ms of the link hidden, {step.time.link:.2f} exposed" in text
    assert f"prediction {step.time.prediction:.2f}" in text
    shares = SHARES[step.ahead_per_cent]
    assert f"foreseen {shares.foreseen:.0%}, wasted {shares.wasted:.0%}" in text
    values = found.as_dict()["step"]
    assert (values["ahead"], values["why_ahead"], values["ms"]["hidden"]) == (True, "shorter", step.time.hidden)
    assert values["ms"]["total"] == step.time.total
    off = plan(qwen_7b, TOKENS, gpu_kv_gb=2, card="RTX 4090", budget_ratio=0.1, ahead=False)
    assert off.step.time.total > step.time.total
    assert (off.step.time.hidden, off.step.time.prediction) == (0, 0)
    assert "copies ahead      off, as asked for" in str(off)
    assert "foreseen" not in str(off)
    assert plan(qwen_7b, TOKENS, gpu_kv_gb=2, budget_ratio=0.1).step.why_ahead == "unknown"


def sizes_text(nbytes: int) -> str:
    from tieredkv.memory.units import size_text

    return size_text(nbytes)


@pytest.fixture(scope="module")
def qwen_7b():
    from transformers import Qwen2Config

    return Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, max_position_embeddings=2**20, dtype=torch.bfloat16,
    )  # fmt: skip


def test_no_limit_is_infinite():
    assert step_waits(SHAPE, TierConfig(step_overhead=None), WEIGHTS, RATES).limit_ms == math.inf
