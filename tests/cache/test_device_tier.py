"""The device side of a cache: where it is, and what stays on it while a prompt is prefilled."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import LateCopies, cap_share, tier_options

from tieredkv.cache import device_tier
from tieredkv.cache.device_tier import DeviceTier
from tieredkv.cache.resident import Resident
from tieredkv.config import TierConfig
from tieredkv.errors import UnsupportedModelError
from tieredkv.memory.copies import ThreadCopies
from tieredkv.memory.host import HostLayer
from tieredkv.planning.prefill_plan import Call

CPU = torch.device("cpu")


@pytest.fixture
def tier(llama):
    def make(prompt_tokens=0, **options):
        made = DeviceTier(TierConfig(**tier_options(**{"gpu_kv_gb": 1, **options})), llama.config, prompt_tokens)
        made.place(CPU, torch.float32)
        return made

    return make


def test_cards_and_the_cpu_do_not_mix(tier):
    on_the_cpu = tier()
    with pytest.raises(UnsupportedModelError, match="cards alone, or on the CPU"):
        on_the_cpu.place(torch.device("cuda", 0), torch.float32)
    with pytest.raises(UnsupportedModelError, match="runs on CUDA devices and the CPU"):
        on_the_cpu.place(torch.device("mps"), torch.float32)
    assert on_the_cpu.devices == [CPU]


def test_the_first_tokens_stay_on_the_device_where_the_prompts_length_is_known(tier):
    host = HostLayer(2, 16, 8, torch.float32)
    unknown, known = tier(), tier(prompt_tokens=100)
    for made in (unknown, known):
        made.keep_first_tokens(0, host, CPU)
    assert unknown.residents == {}
    assert known.residents[0].keys.shape == (2, 104, 16)
    assert known.ledger.by_purpose()["resident"] == 2 * known.residents[0].keys.nbytes


def test_layers_that_begin_after_the_residents_were_dropped_keep_none(llama, tier):
    host = HostLayer(2, 16, 8, torch.float32)
    tight = tier(prompt_tokens=900, gpu_kv_gb=cap_share(llama, 900, 1.2))
    tight.keep_first_tokens(0, host, CPU)
    assert set(tight.residents) == {0}
    tight.make_room_for_scores(Call(0, 900, rows=1))
    assert set(tight.residents) == {0}
    tight.make_room_for_scores(Call(30_000, 30_100, rows=64))
    tight.keep_first_tokens(1, host, CPU)
    assert tight.residents == {}
    assert tight.ledger.by_purpose() == {}


def test_residents_keep_what_fits_and_nothing_after_a_gap():
    resident = Resident(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2))
    tokens = torch.arange(6.0).view(1, 3, 2)
    resident.append(tokens, tokens, first=2)
    assert resident.length == 0
    resident.append(tokens, tokens, first=0)
    resident.append(tokens, tokens, first=3)
    assert resident.length == 4
    assert torch.equal(resident.keys[0, :, 0], torch.tensor([0.0, 2.0, 4.0, 0.0]))


def test_copies_given_by_the_caller_are_used(llama):
    copies = LateCopies()
    assert DeviceTier(TierConfig(), llama.config, copies=copies).copies is copies
    assert isinstance(DeviceTier(TierConfig(), llama.config).copies, ThreadCopies)


def test_decoding_ends_with_nothing_counted(tier):
    made = tier()
    pool = made.new_pool(3, made.codec(8, torch.float32), CPU)
    made.ledger.reserve("tables", 100)
    assert made.ledger.by_purpose() == {"pool": pool.records.nbytes, "tables": 100}
    made.end_decoding()
    assert made.pools == []
    assert made.ledger.by_purpose() == {}


def test_copies_are_limited_where_a_link_is_known_and_no_budget_is_given(tier):
    layers = [CPU] * 3
    assert tier().waits(layers) is None
    known = tier(link_gb_s=10)
    waits = known.waits(layers)
    assert waits.rates.link_gb_s == 10
    known.change_tiers(TierConfig(step_overhead=0.3), empty=False)
    assert known.waits(layers).limit_ms == pytest.approx(2 * waits.limit_ms)
    for options in ({"budget_ratio": 0.1}, {"step_overhead": None}):
        assert tier(link_gb_s=10, **options).waits(layers) is None


def test_on_a_cpu_no_query_is_predicted_whatever_the_link(tier):
    assert tier(link_gb_s=10).waits([CPU] * 3).leads == ()


def test_on_a_card_a_layer_is_predicted_unless_the_one_before_is_on_another(tier):
    known, cards = tier(link_gb_s=10, budget_ratio=0.1), [torch.device("cuda", index) for index in (0, 1)]
    waits = known.waits([cards[0]] * 3)
    assert [lead is None for lead in waits.leads] == [True, False, False]
    assert waits.limit_ms == float("inf")
    split = known.waits([cards[0], cards[0], cards[1]])
    assert [lead is None for lead in split.leads] == [True, False, True]


def test_nothing_is_looked_up_where_nothing_is_to_be_decided(tier, monkeypatch):
    monkeypatch.setattr(device_tier.Weights, "of", lambda *_: pytest.fail("weights were counted"))
    for options in ({"ahead": False}, {"prefetch": False}):
        assert tier(link_gb_s=10, budget_ratio=0.1, **options).waits([torch.device("cuda", 0)] * 3) is None


def test_copies_that_the_host_waits_for_are_not_predicted(tier):
    """Where its memory could not be page-locked; and chunks on disk are known to be there."""
    known, cards = tier(link_gb_s=10, budget_ratio=0.1), [torch.device("cuda", 0)] * 3
    assert not known.waits(cards).on_disk
    known.locker = SimpleNamespace(refusal=lambda: None)
    assert any(known.waits(cards).leads)
    known.locker = SimpleNamespace(refusal=lambda: "no memory")
    assert known.waits(cards).leads == ()
    known.locker, known.disk = None, SimpleNamespace()
    assert known.waits(cards).on_disk


def test_what_nobody_waits_for_delays_no_other_work(tier):
    own, go = tier(), threading.Event()
    slow = [own.beside(lambda: go.wait(20), later=True) for _ in range(50)]
    try:
        assert own.beside(lambda: 1).result(timeout=20) == 1
        assert not slow[0].done()
    finally:
        go.set()
    own.close()
    assert all(work.done() for work in slow)
