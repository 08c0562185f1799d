"""Background copies are waited for before use, and `wait` raises their errors."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import nullcontext

import pytest
import torch
from helpers import PATIENCE_S, LateCopies, pressed, tier_options

import tieredkv
from tieredkv import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.memory import copies as copies_module
from tieredkv.memory.copies import StreamCopies, ThreadCopies


@pytest.fixture
def copies():
    copies = ThreadCopies()
    yield copies
    copies.close()


def test_wait_returns_when_the_copy_is_done(copies):
    gate, done = threading.Event(), []

    def copy() -> int:
        gate.wait(PATIENCE_S)
        done.append(True)
        return 7

    copies.submit("layer", copy)
    assert not done
    gate.set()
    assert copies.wait("layer") == 7
    assert done


def test_waiting_for_nothing_returns_at_once(copies):
    assert copies.wait("layer") == 0


def test_wait_raises_the_error_of_the_copy(copies):
    def fail() -> int:
        raise RuntimeError("the copy failed")

    copies.submit(0, fail)
    with pytest.raises(RuntimeError, match="the copy failed"):
        copies.wait(0)
    assert copies.wait(0) == 0


def test_drain_waits_for_all_copies_and_ignores_their_errors(copies):
    done = []

    def fail() -> int:
        done.append("failed")
        raise RuntimeError

    copies.submit(0, fail)
    copies.submit(1, lambda: done.append("copied") or 5)
    copies.drain()
    assert done == ["failed", "copied"]
    assert copies.wait(0) == copies.wait(1) == 0


def test_a_second_copy_for_one_key_is_refused(copies):
    copies.submit(0, lambda: 0)
    with pytest.raises(RuntimeError, match="outstanding"):
        copies.submit(0, lambda: 0)


def test_closing_ends_the_thread_and_may_be_repeated():
    before = threading.active_count()
    copies = ThreadCopies()
    copies.submit(0, lambda: 0)
    copies.close()
    copies.close()
    assert threading.active_count() == before


def test_an_interrupted_wait_leaves_the_copy_outstanding(copies, monkeypatch):
    """Its slots may be freed only after another wait."""
    started, go = threading.Event(), threading.Event()

    def copy() -> int:
        started.set()
        go.wait(PATIENCE_S)
        return 7

    copies.submit("a", copy)
    assert started.wait(PATIENCE_S)

    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            copies.wait("a")
    go.set()
    assert copies.wait("a") == 7


@pytest.mark.parametrize("options", [{"theta": 2.0}, {"reuse_above": 0.5, "prefetch": True}], ids=str)
def test_the_time_a_copy_arrives_changes_no_logits(llama, long_ids, options):
    """Prefill in chunks and decoding steps give the same logits with prompt copies and with `LateCopies`."""
    tiers = {**pressed(llama, 900, 0.6), "chunk_tokens": 8, "text_window": 16, **options}

    def decode(copies):
        cache = TieredCache(llama.config, **tier_options(**tiers), max_new_tokens=8, copies=copies)
        with torch.no_grad(), tieredkv.use_attention(llama), cache:
            for part in long_ids.split(200, dim=1):
                llama(part, **cache_argument(cache))
            assert cache.device_tier.streamed_bytes > 0
            return torch.stack([llama(long_ids[:, i : i + 1], **cache_argument(cache)).logits for i in range(6)])

    assert torch.equal(decode(None), decode(LateCopies()))


def test_all_copies_to_a_card_share_a_stream(monkeypatch):
    """torch keeps a workspace for every stream that has multiplied matrices."""

    class Stream:
        def __init__(self, card):
            made.append(card)

        def wait_stream(self, other):
            pass

        def synchronize(self):
            synchronised.append(self)

    class Event:
        def record(self, stream):
            pass

    made, synchronised = [], []
    monkeypatch.setattr(copies_module, "_streams", {})
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    several = [StreamCopies() for _ in range(3)]
    for card in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda card=card: card)
        for one in several:
            one.submit(card, lambda: 5)
    assert made == [0, 1]
    several[0].drain()
    assert len(synchronised) == 2, "those that it used"
    StreamCopies().drain()
    assert len(synchronised) == 2
