"""Limits on torch's threads, for the calling thread alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tieredkv.environment import threads


@pytest.fixture
def two_threads():
    """torch set to two threads, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


needs_setters = pytest.mark.skipif(
    threads._setters() is None, reason="this torch is not built with OpenMP and MKL: threads are not limited"
)


@needs_setters
def test_threads_are_limited_only_inside_the_block(two_threads):
    with threads.at_most(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@needs_setters
def test_threads_are_restored_after_an_error(two_threads):
    with pytest.raises(KeyError), threads.at_most(1):
        raise KeyError
    assert torch.get_num_threads() == 2


@needs_setters
def test_another_thread_keeps_its_threads(two_threads):
    with threads.at_most(1), ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2
    assert torch.get_num_threads() == 2


def test_a_higher_limit_adds_no_threads(two_threads):
    with threads.at_most(3):
        assert torch.get_num_threads() == 2


def test_without_openmp_and_mkl_threads_are_not_limited(two_threads, monkeypatch):
    monkeypatch.setattr(threads, "_setters", lambda: None)
    with threads.at_most(1):
        assert torch.get_num_threads() == 2


def test_small_steps_get_one_thread_and_large_ones_more():
    assert threads.worth(0) == 1
    assert threads.worth(2 * threads.NUMBERS_PER_THREAD) == 2


@needs_setters
def test_decoding_steps_of_a_short_context_use_one_thread(two_threads, llama, long_ids, monkeypatch):
    from tieredkv import TieredCache, use_attention
    from tieredkv.cache.sealed_layer import SealedLayer
    from tieredkv.environment.versions import cache_argument

    seen, step = set(), SealedLayer.step

    def recording(self, *inputs):
        seen.add(torch.get_num_threads())
        return step(self, *inputs)

    monkeypatch.setattr(SealedLayer, "step", recording)
    with use_attention(llama), TieredCache(llama.config, gpu_kv_gb=0.001, max_new_tokens=4) as cache:
        llama.generate(long_ids, **cache_argument(cache), max_new_tokens=4)
    assert seen == {1}
    assert torch.get_num_threads() == 2
