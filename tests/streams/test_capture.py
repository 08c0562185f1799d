"""Captures of a step's graph, on a simulated card: what they share, and what happens after one that fails."""

from __future__ import annotations

import copy
import gc
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from helpers import PATIENCE_S, pressed, tier_options
from queues import Graph
from simulated_card import CARD, on_card, simulated_card

import tieredkv
from tieredkv import TieredCache
from tieredkv.cache.question import Question
from tieredkv.environment.versions import cache_argument
from tieredkv.memory import pagelock
from tieredkv.memory.capturing import capturing
from tieredkv.memory.card import return_unused
from tieredkv.memory.pagelock import PageLocker, aligned
from tieredkv.session import step_graph
from tieredkv.session.step_graph import StepGraph

pytestmark = pytest.mark.interpreter
TOKENS = 120


@pytest.fixture(autouse=True)
def no_earlier_captures(monkeypatch):
    monkeypatch.setattr(step_graph, "_captures", {})


def answer(model, ids, steps=5, path=None, fail_at=None, looks=None, **options):
    """Logits of an answer's steps, how the last ran, and what it has counted. fail_at: a step whose forward raises.
    looks: records evidence."""
    tiers = {**pressed(model, ids.shape[1], 0.9), "chunk_tokens": 8, "text_window": 16, "theta": 2.0, **options}
    cache = TieredCache(model.config, **tier_options(**tiers))
    with torch.no_grad(), tieredkv.use_attention(model), cache:
        cache.expect(Question(max_new_tokens=8, looks=looks))
        model(ids, **cache_argument(cache))
        cache.seal()
        calls = 0

        def forward(token, place):
            nonlocal calls
            calls += 1
            logits = model(token, **cache_argument(cache), position_ids=place).logits[:, -1]
            if calls == fail_at:
                raise RuntimeError("CUDA error: operation not permitted\nmore")
            return logits

        step = StepGraph(forward, cache, CARD, axes=1, position=ids.shape[1])
        step.path = path or step.path
        rows = torch.cat([step(7 + i).cpu() for i in range(steps)])
        cache.finish()
        counters = cache.counters
        counts = cache.get_seq_length(), counters.selected, counters.missed_bytes, counters.prefetched_bytes
        return rows, step.path, counts


@pytest.mark.parametrize(
    "options", [{}, {"reuse_above": 0.5, "prefetch": True}, {"gpu_kv_gb": 1.0, "budget_ratio": None}], ids=str
)
def test_a_replayed_step_gives_what_an_eager_one_gives(one_layer, long_ids, monkeypatch, options):
    ids = long_ids[:, :TOKENS]
    with simulated_card(monkeypatch):
        model = on_card(copy.deepcopy(one_layer))
        want, _, counted = answer(model, ids.to(CARD), path="eager: asked for", **options)
        got, path, counts = answer(model, ids.to(CARD), **options)
    assert path == "graph"
    assert torch.equal(got, want)
    assert counts == counted


def test_answers_share_one_capture_stream(one_layer, long_ids, monkeypatch):
    with simulated_card(monkeypatch) as card:
        model, ids = on_card(copy.deepcopy(one_layer)), long_ids[:, :TOKENS].to(CARD)
        for _ in range(2):
            assert answer(model, ids, steps=2)[1] == "graph"
    assert [stream.priority for stream in card.streams].count(-1) == 1


def test_after_a_failed_capture_steps_run_eagerly_and_none_is_tried_again(one_layer, long_ids, monkeypatch):
    made, begin = set(), Graph.__init__
    monkeypatch.setattr(Graph, "__del__", lambda graph: made.discard(id(graph)), raising=False)
    monkeypatch.setattr(Graph, "__init__", lambda graph: (made.add(id(graph)), begin(graph))[1])
    with simulated_card(monkeypatch) as card:
        model, ids = on_card(copy.deepcopy(one_layer)), long_ids[:, :TOKENS].to(CARD)
        before = card.current
        want, _, counted = answer(model, ids, path="eager: asked for")
        got, path, counts = answer(model, ids, fail_at=2)
        assert card.current is before, "the stream of the failed capture is still current"
        gc.collect()
        assert len(made) == 1, "the graph that failed is gone"
        again, second, _ = answer(model, ids)
        assert len(made) == 1, "another capture was begun"
    assert path == "eager: CUDA error: operation not permitted"
    assert second == "eager: an earlier capture failed (CUDA error: operation not permitted)"
    assert torch.equal(got, want)
    assert torch.equal(again, want)
    assert counts == counted


def test_an_allocator_that_refuses_after_a_failed_capture_stops_no_question(monkeypatch):
    def refuse():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    return_unused([CARD])


def test_no_garbage_is_collected_during_a_capture():
    with capturing():
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.fixture
def driver(monkeypatch):
    """Calls of the driver by a `PageLocker`, in order."""
    calls = []
    monkeypatch.setattr(pagelock.torch.cuda, "device", lambda card: nullcontext())
    monkeypatch.setattr(pagelock.torch.cuda, "synchronize", lambda card: calls.append("synchronize"))
    runtime = SimpleNamespace(
        cudaHostRegister=lambda *args: calls.append("register") or 0,
        cudaHostUnregister=lambda *args: calls.append("unregister") or 0,
    )
    monkeypatch.setattr(pagelock.torch.cuda, "cudart", lambda: runtime)
    return calls


def unlock_beside(holder, locker, memory, driver):
    """Unlock on another thread while this one is in `holder`."""
    thread = threading.Thread(target=locker.unlock, args=(memory,))
    with holder:
        thread.start()
        thread.join(0.2)
        during = list(driver)
    thread.join(PATIENCE_S)
    return during


def test_memory_is_not_unlocked_while_a_graph_is_captured(driver):
    locker, memory = PageLocker(), aligned((4, 8), torch.float32)
    locker.use(CARD)
    locker.lock(memory)
    assert locker.refusal() is None
    assert unlock_beside(capturing(), locker, memory, driver) == ["register"]
    assert driver == ["register", "synchronize", "unregister"]
    locker.close()


def test_memory_that_could_not_be_unlocked_stays_alive(driver, monkeypatch):
    locker = PageLocker()
    locker.use(CARD)
    memory = aligned((4, 8), torch.float32)
    locker.lock(memory)
    assert locker.refusal() is None

    def refuse(card):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with monkeypatch.context() as patched:
        patched.setattr(pagelock.torch.cuda, "synchronize", refuse)
        with pytest.raises(RuntimeError, match="not permitted"):
            locker.unlock(memory)
    locker.unlock(memory)
    assert driver == ["register", "synchronize", "unregister"]
    locker.close()
