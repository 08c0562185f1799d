"""A whole session on a simulated card: a video, two questions, and copies for predicted queries in replayed steps."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from helpers import RecordLogits, assert_near, pressed, tier_options
from simulated_card import on_card, simulated_card, stages_without_threads

import tieredkv
from tieredkv.session import step_graph

pytestmark = [pytest.mark.slow, pytest.mark.interpreter]
QUESTIONS = ("what colour was the star ?", "follow the moon for 4 ?")
NEW = 4
"""Tokens of an answer: the first needs no step, one step is eager, one captured, and one only replayed."""


@pytest.fixture(scope="module")
def two_layers(video_model):
    """The second layer's query is predicted."""
    model = copy.deepcopy(video_model)
    model.model.language_model.layers = model.model.language_model.layers[:2]
    config = model.config.text_config
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    return model


def answered(model, frames, processor, **options):
    """Logits and statistics of each answer."""
    tiers = {"chunk_tokens": 8, "recent_window": 16, "theta": 2.0, "stay": 1.0, "prefill_chunk": 80, **options}
    found = []
    with tieredkv.open_session(
        model, frames[:56], processor=processor, fps=4, **pressed(model, 150, 0.9), **tier_options(**tiers)
    ) as session:
        for question in QUESTIONS:
            record = RecordLogits()
            stats = session.ask(question, max_new_tokens=NEW, do_sample=False, logits_processor=[record]).stats
            found.append((torch.cat(record.seen).cpu(), stats))
    return found


def test_answers_are_those_without_copies_ahead_and_those_of_a_cpu(two_layers, frames, processor, monkeypatch):
    monkeypatch.setattr(step_graph, "_captures", {})
    on_cpu = answered(two_layers, frames, processor, ahead=False)
    stages_without_threads(monkeypatch)
    by_order = {}
    for order, ahead in (("at once", False), ("late", True)):
        with simulated_card(monkeypatch, order):
            by_order[order] = answered(on_card(copy.deepcopy(two_layers)), frames, processor, ahead=ahead)
    for (want, plain), (got, stats), (near, _) in zip(by_order["at once"], by_order["late"], on_cpu, strict=True):
        assert plain.decode_path == stats.decode_path == "graph"
        assert plain.prefetched_bytes == 0 < stats.prefetched_bytes
        assert torch.equal(got, want)
        assert_near(got, near)
