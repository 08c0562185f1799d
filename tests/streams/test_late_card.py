"""Caches on a simulated card: whenever things happen, the numbers are those of a card that does everything at once."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from helpers import assert_near, pressed, tier_options
from queues import Queues, Stream, Work
from simulated_card import CARD, on_card, simulated_card
from transformers import DynamicCache

import tieredkv
from tieredkv import TieredCache
from tieredkv.cache.prefill import Past
from tieredkv.cache.question import Question
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.copies import StreamCopies
from tieredkv.policy import select

pytestmark = [pytest.mark.slow, pytest.mark.interpreter]
TOKENS, ORDERS = 160, ("late", "copies first", 1)
REUSE = {"theta": 2.0, "reuse_above": 0.0, "prefetch": True}
"""Every other step reuses the chunks before (`reuse_in_turn`), and those after may find what was fetched ahead."""
SETTINGS = {
    "ranked": {"theta": 2.0},
    "reuse and prefetch": REUSE,
    "4 bits": {"host_kv_bits": 4},
    "unranked": {"theta": 2.0, "gpu_kv_gb": 1.0, "budget_ratio": None},
}


def cache_of(model, **options):
    tiers = {**pressed(model, TOKENS, 0.9), "chunk_tokens": 8, "text_window": 16, **options}
    return TieredCache(model.config, **tier_options(**tiers), max_new_tokens=8, prompt_tokens=options.get("known", 0))


def read(model, cache, ids, at_once=40):
    for part in ids.split(at_once, dim=1):
        logits = model(part, **cache_argument(cache)).logits[0, -1]
    return logits


def steps(model, cache, ids, count):
    return [model(ids[:, i : i + 1], **cache_argument(cache)).logits[0, -1] for i in range(count)]


def one_question(model, ids, **options):
    """Prefill in calls that stream the past, then four steps."""
    with tieredkv.use_attention(model), cache_of(model, **options) as cache:
        rows = [read(model, cache, ids), *steps(model, cache, ids, 5)]
        assert cache.device_tier.streamed_bytes > 0
        cache.finish()
        counted = cache.counters
        return [*(row.cpu() for row in rows), torch.tensor([counted.missed_bytes, counted.prefetched_bytes])]


def two_questions(model, ids, **options):
    """A context, a question and its answer, the same context again, and a longer one that keeps what was generated."""
    with tieredkv.use_attention(model), cache_of(model, **options) as cache:
        read(model, cache, ids[:, :130])
        cache.settle()
        rows = []
        for first in (130, 140):
            cache.expect(Question(max_new_tokens=4))
            rows += [read(model, cache, ids[:, first : first + 20]), *steps(model, cache, ids, 2)]
            cache.truncate(130)
        rows += [read(model, cache, ids[:, 130:145]), *steps(model, cache, ids, 1)]
        rows += [read(model, cache, ids[:, 60:65]), *steps(model, cache, ids, 1)]
        return [row.cpu() for row in rows]


def saved(model, ids, **options):
    """What is written to a file after a context, and an answer from it."""
    with tieredkv.use_attention(model), cache_of(model, **options) as cache:
        read(model, cache, ids[:, :135])
        cache.settle()
        state = {name: part.clone() for name, part in cache.tiered_layers[0].state().items()}
        rows = [read(model, cache, ids[:, 135:]), *steps(model, cache, ids, 1)]
        return [*(state[name] for name in sorted(state)), *(row.cpu() for row in rows)]


def reuse_in_turn(patch):
    """Let queries count as similar to those before in every other step."""
    turns = itertools.cycle((-1.0, 1.0))
    patch.setattr(
        select, "query_similarity", lambda query, before: torch.full((len(query),), next(turns), device=query.device)
    )


def on_a_card(patch, model, ids, path, order, **options):
    reuse_in_turn(patch)
    with torch.no_grad(), simulated_card(patch, order):
        return path(on_card(copy.deepcopy(model)), ids[:, :TOKENS].to(CARD), **options)


@pytest.fixture(scope="module")
def at_once():
    """Results of a card that does everything at once, by path and setting."""
    return {}


def check(patch, model, ids, path, order, at_once, name, fault=None):
    options, key = SETTINGS[name], (path.__name__, name)
    if key not in at_once:
        at_once[key] = on_a_card(patch, model, ids, path, "at once", **options)
    if fault is not None:
        fault(patch)
    for got, want in zip(on_a_card(patch, model, ids, path, order, **options), at_once[key], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_one_question(one_layer, long_ids, monkeypatch, at_once, name, order):
    check(monkeypatch, one_layer, long_ids, one_question, order, at_once, name)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["reuse and prefetch", "4 bits"])
def test_several_turns(one_layer, long_ids, monkeypatch, at_once, name, order):
    check(monkeypatch, one_layer, long_ids, two_questions, order, at_once, name)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["4 bits"])
def test_saving(one_layer, long_ids, monkeypatch, at_once, name, order):
    check(monkeypatch, one_layer, long_ids, saved, order, at_once, name)


@pytest.mark.parametrize("order", ORDERS)
def test_a_full_budget_equals_stock_transformers(one_layer, long_ids, monkeypatch, order):
    options = {"gpu_kv_gb": 1.0, "budget_ratio": None, "host_kv_bits": 16}
    got = on_a_card(monkeypatch, one_layer, long_ids, one_question, order, **options)
    ids, cache = long_ids[:, :TOKENS], DynamicCache(config=one_layer.config)
    with torch.no_grad():
        want = [read(one_layer, cache, ids), *steps(one_layer, cache, ids, 5)]
    assert_near(torch.stack(got[:-1]), torch.stack(want))


# ---- that the card shows it: each fault is planted


def missing_wait(patch):
    patch.setattr(StreamCopies, "wait", lambda copies, key: copies._pending.pop(key, (None, 0, None))[1])


def copies_that_do_not_wait(patch):
    patch.setattr(Stream, "wait_stream", lambda stream, other: None)


def copies_that_keep_nothing_alive(patch):
    submit = StreamCopies.submit

    def forgetful(copies, key, copy):
        submit(copies, key, copy)
        copies._pending[key] = (*copies._pending[key][:2], None)

    patch.setattr(StreamCopies, "submit", forgetful)


def buffers_refilled_while_read(patch):
    """Prefill stages every block into the same buffer, while the block before may still be attended to."""
    staged = Past._staged

    def same(past, index):
        before, past._staging = past._staging, past._staging[:1]
        try:
            return staged(past, index)
        finally:
            past._staging = before

    patch.setattr(Past, "_staged", same)


@pytest.mark.parametrize(
    ("fault", "order", "name"),
    [
        (missing_wait, "late", "ranked"),
        (copies_that_do_not_wait, "copies first", "ranked"),
        (copies_that_keep_nothing_alive, "late", "reuse and prefetch"),
        (copies_that_do_not_wait, "copies first", "reuse and prefetch"),
        (buffers_refilled_while_read, "copies first", "ranked"),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_a_fault_shows(one_layer, long_ids, monkeypatch, at_once, fault, order, name):
    with pytest.raises((AssertionError, torch.linalg.LinAlgError)):  # other numbers, or NaN
        check(monkeypatch, one_layer, long_ids, one_question, order, at_once, name, fault)


@pytest.mark.parametrize("order", ["at once", 0, 1, 2])
def test_no_work_overtakes_work_in_the_middle_of_which_more_is_queued(order):
    """As happens where garbage is collected: memory that is freed is poisoned in turn."""
    queues, done = Queues("late"), []

    def work(number):
        queues.enqueue(Work(lambda: done.append(-number)))
        done.append(number)

    for number in range(1, 20):
        queues.enqueue(Work(lambda number=number: work(number)))
    queues.order = order
    queues._chance = Queues(order)._chance
    queues.synchronize(queues.current)
    while queues.current.queue:
        queues.synchronize(queues.current)
    assert done == [*range(1, 20), *range(-1, -20, -1)]
