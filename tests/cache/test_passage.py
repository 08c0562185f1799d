"""A passage puts tokens back into a cache as they were, without the model."""

from __future__ import annotations

import pytest
import torch
from helpers import random_text_model, tier_options

import tieredkv
from tieredkv.cache.passage import Passage
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument

CONTEXT_TOKENS, STOP = 150, 213


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen3_5_text"])
def model(request):
    return random_text_model(request.param)


@torch.no_grad()
def forward(model, cache, ids):
    with tieredkv.use_attention(model):
        return model(ids, **cache_argument(cache)).logits[:, -1]


def answer(model, cache, ids):
    """Logits of the end of a question and of two decoded tokens."""
    cache.expect(Question(prompt_tokens=cache.get_seq_length() + ids.shape[1] - 2, max_new_tokens=2))
    parts = ids.split([ids.shape[1] - 2, 1, 1], dim=1)
    return torch.cat([forward(model, cache, part) for part in parts])


@pytest.fixture(params=[{}, {"prompt_tokens": 230}], ids=["streamed", "resident"])
def cache(request, model, long_ids):
    """A context, and more tokens after it."""
    with TieredCache(model.config, **tier_options(gpu_kv_gb=1, theta=2.0), **request.param) as cache:
        cache.expect(CONTEXT)
        forward(model, cache, long_ids[:, :CONTEXT_TOKENS])
        cache.settle()
        forward(model, cache, long_ids[:, CONTEXT_TOKENS:STOP])
        yield cache


def test_a_cache_continues_to_the_bit_after_another_question(model, cache, long_ids):
    passage = Passage.of(cache, CONTEXT_TOKENS)
    resident = len(cache.device_tier.residents)
    want = answer(model, cache, long_ids[:, STOP:230])
    for _ in range(2):
        cache.truncate(CONTEXT_TOKENS)
        answer(model, cache, long_ids[:, 300:380])
        cache.truncate(CONTEXT_TOKENS)
        passage.append_to(cache)
        assert cache.get_seq_length() == STOP
        got = answer(model, cache, long_ids[:, STOP:230])
        # Residents are attended to in blocks of their own.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 if resident else 0)


@pytest.mark.parametrize("cache", [{"prompt_tokens": 230}], indirect=True, ids=["resident"])
def test_residents_on_the_device_are_put_back(cache):
    assert cache.device_tier.residents
    passage = Passage.of(cache, CONTEXT_TOKENS)
    cache.truncate(CONTEXT_TOKENS)
    passage.append_to(cache)
    assert {resident.length for resident in cache.device_tier.residents.values()} == {STOP}


def test_it_takes_what_is_planned(cache):
    passage = Passage.of(cache, CONTEXT_TOKENS)
    assert passage.nbytes == Passage.nbytes_of(cache, CONTEXT_TOKENS) > 0


def test_a_shorter_one_exists_where_layers_can_be_truncated(model, cache, long_ids):
    passage = Passage.of(cache, CONTEXT_TOKENS)
    assert passage.first(63) is passage.first(99) is passage
    assert passage.first(0) is None
    shorter = passage.first(40)
    cache.truncate(CONTEXT_TOKENS)
    if model.config.model_type != "llama":
        assert shorter is None
        return
    shorter.append_to(cache)
    got = answer(model, cache, long_ids[:, CONTEXT_TOKENS + 40 : 230])
    with TieredCache(model.config, gpu_kv_gb=1) as other:
        other.expect(CONTEXT)
        forward(model, other, long_ids[:, : CONTEXT_TOKENS + 40])
        want = answer(model, other, long_ids[:, CONTEXT_TOKENS + 40 : 230])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_it_fits_only_where_it_begins(cache):
    passage = Passage.of(cache, CONTEXT_TOKENS)
    with pytest.raises(RuntimeError, match="does not end at 150"):
        passage.append_to(cache)
