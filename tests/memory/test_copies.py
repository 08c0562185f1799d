"""Copies that run ahead: waited for before use, and their errors reach whoever waits."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import PATIENCE_S, LateCopies, pressed

import tieredkv
from tieredkv import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.copies import ThreadPrefetcher, Transfer


@pytest.fixture
def prefetcher():
    made = ThreadPrefetcher()
    yield made
    made.close()


def test_wait_returns_only_when_the_copy_is_done(prefetcher):
    gate, done = threading.Event(), []

    def copy() -> int:
        gate.wait(PATIENCE_S)
        done.append(True)
        return 7

    prefetcher.submit("layer", copy)
    assert not done
    gate.set()
    assert prefetcher.wait("layer") == 7
    assert done


def test_waiting_for_nothing_returns_at_once(prefetcher):
    assert prefetcher.wait("layer") == 0


def test_an_error_in_the_copy_reaches_the_waiter(prefetcher):
    def fail() -> int:
        raise RuntimeError("the copy failed")

    prefetcher.submit(0, fail)
    with pytest.raises(RuntimeError, match="the copy failed"):
        prefetcher.wait(0)
    assert prefetcher.wait(0) == 0


def test_draining_waits_for_all_and_swallows_their_errors(prefetcher):
    done = []

    def fail() -> int:
        done.append("failed")
        raise RuntimeError

    prefetcher.submit(0, fail)
    prefetcher.submit(1, lambda: done.append("copied") or 5)
    prefetcher.drain()
    assert done == ["failed", "copied"]
    assert prefetcher.wait(0) == prefetcher.wait(1) == 0


def test_a_second_copy_for_one_key_is_refused(prefetcher):
    prefetcher.submit(0, lambda: 0)
    with pytest.raises(RuntimeError, match="outstanding"):
        prefetcher.submit(0, lambda: 0)


def test_closing_ends_the_thread_and_twice_is_fine():
    before = threading.active_count()
    made = ThreadPrefetcher()
    made.submit(0, lambda: 0)
    made.close()
    made.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("with_values", [True, False])
def test_staging_copies_keys_and_where_asked_values(with_values):
    chunks, staged = torch.randn(2, 3, 2, 4, 5), torch.zeros(2, 3, 2, 4, 5)
    moved = Transfer().stage(chunks, staged, with_values)
    assert torch.equal(staged[:, :, 0], chunks[:, :, 0])
    assert torch.equal(staged[:, :, 1], chunks[:, :, 1] * with_values)
    assert moved == 2 * 3 * 4 * 5 * 4 * (1 + with_values)


def test_an_interrupted_wait_leaves_the_copy_outstanding(monkeypatch):
    """Whoever gives up its slots after that must still be able to wait for it."""
    from concurrent.futures import Future

    begun, go = threading.Event(), threading.Event()
    copies = ThreadPrefetcher()

    def copy() -> int:
        begun.set()
        go.wait(PATIENCE_S)
        return 7

    copies.submit("a", copy)
    assert begun.wait(PATIENCE_S)

    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            copies.wait("a")
    go.set()
    assert copies.wait("a") == 7
    copies.close()


@pytest.mark.parametrize("options", [{"theta": 2.0}, {"reuse_above": 0.5, "prefetch": True}], ids=str)
def test_when_a_copy_arrives_changes_nothing(llama, long_ids, options):
    """Prefill in calls over a staged past, and steps: copies as they come, and each at the last moment."""
    tiers = {**pressed(llama, 900, 0.6), "chunk_tokens": 8, "text_window": 16, **options}

    def decode(copies):
        made = TieredCache(llama.config, **tiers, max_new_tokens=8, copies=copies)
        with torch.no_grad(), tieredkv.use_attention(llama), made as cache:
            for part in long_ids.split(200, dim=1):
                llama(part, **cache_argument(cache))
            assert cache.device_tier.transfer.streamed_bytes > 0
            return torch.stack([llama(long_ids[:, i : i + 1], **cache_argument(cache)).logits for i in range(6)])

    assert torch.equal(decode(None), decode(LateCopies()))
