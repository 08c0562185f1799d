"""Layers that cannot be truncated go back to where the cache was settled, by a snapshot."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near, random_text_model, stock_logits, tier_options

import tieredkv
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import OptionError, TieredKVError

CONTEXT_TOKENS = 150
"""More than the sliding window of the tiny model."""
KINDS = {
    "gemma3_text": "sliding windows",
    "gemma4_text": "sliding windows",
    "qwen3_5_text": "linear attention",
    "lfm3": "convolutions and sliding windows",
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return random_text_model(request.param)


@torch.no_grad()
def forward(model, cache, ids):
    """Cache more tokens; the logits of the last."""
    with tieredkv.use_attention(model):
        return model(ids, **cache_argument(cache)).logits[:, -1]


def answer(model, cache, prompt, new=6):
    """Logits of a greedy answer to a prompt that begins with what is cached."""
    cache.expect(Question(prompt_tokens=prompt.shape[1], max_new_tokens=new))
    with tieredkv.use_attention(model):
        return stock_logits(model, {"input_ids": prompt}, new, **cache_argument(cache))


def settled(model, ids, **options):
    """A cache of a context that questions can be asked about."""
    cache = TieredCache(model.config, **tier_options(gpu_kv_gb=1, **options))
    cache.expect(CONTEXT)
    for part in ids.split(60, dim=1):
        forward(model, cache, part)
    cache.settle()
    return cache


@pytest.fixture
def cache(model, long_ids):
    with settled(model, long_ids[:, :CONTEXT_TOKENS]) as cache:
        yield cache


def questions(long_ids):
    """Three prompts: a question shorter than the window, one longer, and the first again."""
    context = long_ids[:, :CONTEXT_TOKENS]
    short, long = long_ids[:, 300:309], long_ids[:, 400:480]
    return [torch.cat((context, tail), dim=1) for tail in (short, long, short)]


@pytest.mark.parametrize("theta", [0.0, 2.0], ids=["all static", "all dynamic"])
def test_each_question_is_answered_as_if_it_were_the_first(model, long_ids, theta):
    prompts = questions(long_ids)
    stock = [stock_logits(model, {"input_ids": prompt}, 6) for prompt in prompts]
    with settled(model, long_ids[:, :CONTEXT_TOKENS], theta=theta) as cache:
        for prompt, want in zip(prompts, stock, strict=True):
            assert_near(answer(model, cache, prompt), want)
            cache.truncate(CONTEXT_TOKENS)
            assert {cache.get_seq_length(), cache.tiered_layers[0].prompt_length} == {CONTEXT_TOKENS}


def test_questions_under_plain_generate(model, long_ids):
    """Of a cache that is told nothing but where the context ends."""
    prompts = questions(long_ids)
    stock = [stock_logits(model, {"input_ids": prompt}, 6) for prompt in prompts]
    with TieredCache(model.config, gpu_kv_gb=1) as cache:
        forward(model, cache, long_ids[:, :CONTEXT_TOKENS])
        cache.settle()
        for prompt, want in zip(prompts, stock, strict=True):
            with tieredkv.use_attention(model):
                assert_near(stock_logits(model, {"input_ids": prompt}, 6, **cache_argument(cache)), want)
            cache.truncate(CONTEXT_TOKENS)


def test_the_same_question_has_the_same_answer_to_the_bit(model, cache, long_ids):
    prompt = questions(long_ids)[1]
    answers = []
    for _ in range(3):
        answers.append(answer(model, cache, prompt))
        cache.truncate(CONTEXT_TOKENS)
    assert torch.equal(answers[1], answers[2])
    assert_near(answers[0], answers[1])


def test_other_lengths_are_refused_with_those_that_are_possible(model, cache, long_ids):
    kind = KINDS[model.config.model_type]
    prompt = questions(long_ids)[1]
    forward(model, cache, prompt[:, CONTEXT_TOKENS:])
    for tokens in (CONTEXT_TOKENS - 1, CONTEXT_TOKENS + 1, 229):
        with pytest.raises(
            OptionError, match=rf"{kind} cannot go back to {tokens} of 230 tokens, only to 0 or to 150,"
        ):
            cache.truncate(tokens)
    cache.truncate(230)
    cache.crop(0)
    more = torch.cat((prompt, long_ids[:, 500:505]), dim=1)
    assert_near(answer(model, cache, more), stock_logits(model, {"input_ids": more}, 6))  # nothing has changed
    cache.crop(CONTEXT_TOKENS - cache.get_seq_length())


def test_without_a_snapshot_the_refusal_says_how_to_get_one(model, long_ids):
    with TieredCache(model.config, gpu_kv_gb=1) as cache:
        forward(model, cache, long_ids[:, :150])
        with pytest.raises(OptionError, match=r"only to 0\. Call settle\(\)"):
            cache.truncate(149)


def test_an_emptied_cache_takes_another_prompt_and_has_no_snapshot(model, cache, long_ids):
    other = long_ids[:, 300:480]
    cache.truncate(0)
    assert cache.get_seq_length() == 0
    assert_near(answer(model, cache, other), stock_logits(model, {"input_ids": other}, 6))
    with pytest.raises(OptionError, match=r"only to 0\. Call settle\(\)"):
        cache.truncate(CONTEXT_TOKENS)


def test_settling_again_moves_the_snapshot(model, cache, long_ids):
    first, _, _ = questions(long_ids)
    before = cache.untiered_bytes, cache.host_bytes
    forward(model, cache, first[:, CONTEXT_TOKENS:])
    cache.reserve(first.shape[1])
    cache.settle()
    more = torch.cat((first, long_ids[:, 500:570]), dim=1)
    want = stock_logits(model, {"input_ids": more}, 6)
    for _ in range(2):
        assert_near(answer(model, cache, more), want)
        with pytest.raises(OptionError, match=f"only to 0 or to {first.shape[1]},"):
            cache.truncate(CONTEXT_TOKENS)
        cache.truncate(first.shape[1])
    assert cache.untiered_bytes <= before[0]


def test_the_snapshot_counts_as_host_memory_until_it_is_dropped(model, cache):
    tiered = sum(layer.host.nbytes for layer in cache.tiered_layers)
    window = 2 * 2 * 32 * 16 * 4  # K and V, heads, tokens, dimensions, bytes
    states = {
        "gemma3_text": 2 * window,
        "gemma4_text": window,  # the other one reads
        "qwen3_5_text": 6 * (4 * 16 * 16 + (2 * 16 + 2 * 16 + 4 * 16) * 4) * 4,
        "lfm3": window + 3 * 64 * 7 * 4,  # layers, channels, tokens, bytes
    }
    assert cache.host_bytes == tiered + states[model.config.model_type]
    cache.truncate(0)
    assert cache.host_bytes == sum(layer.host.nbytes for layer in cache.tiered_layers)


def test_closing_frees_states_and_snapshot(model, cache, long_ids):
    assert cache.untiered_bytes > 0
    cache.close()
    assert cache.untiered_bytes == cache.host_bytes == 0
    with pytest.raises(TieredKVError, match="closed"):
        forward(model, cache, long_ids[:, :9])
    assert cache.untiered_bytes == 0, "although such layers come before the first one that grows"


def test_a_model_of_tiered_layers_alone_needs_no_snapshot(llama, long_ids):
    with settled(llama, long_ids[:, :CONTEXT_TOKENS]) as cache:
        assert cache.untiered_bytes == 0
        assert cache.host_bytes == sum(layer.host.nbytes for layer in cache.tiered_layers)
        cache.truncate(77)
        assert cache.get_seq_length() == 77
