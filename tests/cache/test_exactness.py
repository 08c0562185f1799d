"""Budget >= prompt: the logits of stock transformers (sdpa, full cache). Everything else depends on this."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near, pressed, session_logits, stock_inputs, stock_logits, tier_options

import tieredkv
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument

THETAS = pytest.mark.parametrize("theta", [0.0, 2.0], ids=["all static", "all dynamic"])


@THETAS
def test_text_model_through_generate(text_model, prompt_ids, theta):
    stock = stock_logits(text_model, {"input_ids": prompt_ids}, 24)
    with (
        tieredkv.use_attention(text_model),
        TieredCache(text_model.config, **tier_options(gpu_kv_gb=1, theta=theta)) as cache,
    ):
        tiered = stock_logits(text_model, {"input_ids": prompt_ids}, 24, **cache_argument(cache))
    assert_near(tiered, stock)


@pytest.mark.parametrize("chunk", [1, 37, 64, 150, 299])
def test_text_model_prefilled_in_chunks(text_model, prompt_ids, chunk):
    stock = text_model(prompt_ids).logits
    tiers = tieredkv.TierConfig(gpu_kv_gb=1, chunk_tokens=16)
    with torch.no_grad(), tieredkv.use_attention(text_model), TieredCache(text_model.config, tiers) as cache:
        cache.expect(Question(prompt_tokens=300))
        parts = [text_model(part, **cache_argument(cache)).logits for part in prompt_ids.split(chunk, dim=1)]
    assert_near(torch.cat(parts, dim=1), stock)


@THETAS
def test_second_turn_in_the_same_cache(text_model, prompt_ids, theta):
    """Turn 2 continues after the generated tokens of turn 1, as with a stock cache."""

    def two_turns(cache):
        first = text_model.generate(prompt_ids, **cache_argument(cache), max_new_tokens=9, do_sample=False)
        more = torch.cat((first, prompt_ids[:, :50]), dim=1)
        return stock_logits(text_model, {"input_ids": more}, 9, **cache_argument(cache))

    from transformers import DynamicCache

    stock = two_turns(DynamicCache(config=text_model.config))
    with (
        tieredkv.use_attention(text_model),
        TieredCache(text_model.config, **tier_options(gpu_kv_gb=1, theta=theta)) as cache,
    ):
        tiered = two_turns(cache)
    assert_near(tiered, stock)


@THETAS
@pytest.mark.parametrize("prefill_chunk", [4096, 50])
def test_video_model_over_two_questions(video_model, processor, frames, theta, prefill_chunk):
    with tieredkv.open_session(
        video_model,
        frames,
        gpu_kv_gb=1,
        processor=processor,
        fps=4,
        positions="stock",
        **tier_options(theta=theta),
        prefill_chunk=prefill_chunk,
    ) as session:
        for question in ("what colour was the star ?", "follow the moon for 4 ?"):
            tiered = session_logits(session, question, 10)
            stock = stock_logits(video_model, stock_inputs(processor, frames, question), 10)
            assert_near(tiered, stock)


@pytest.mark.parametrize(("frames_used", "fps"), [(2, 4.0), (7, 4.0), (61, 2.0), (120, 1.0)])
def test_video_model_over_frame_counts_and_rates(video_model, processor, frames, frames_used, fps):
    """Odd counts are padded by the processor; the rate changes the temporal positions."""
    video, question = frames[:frames_used], "follow the star for 2 ?"
    stock = stock_logits(video_model, stock_inputs(processor, video, question, fps), 4)
    with tieredkv.open_session(
        video_model, video, gpu_kv_gb=1, processor=processor, fps=fps, positions="stock"
    ) as session:
        assert_near(session_logits(session, question, 4), stock)


def test_published_positions_equal_a_stock_forward_given_them(video_model, processor, frames):
    """max(previous) + 1 after the video, checked against a stock forward with those positions passed in."""
    question = "what colour was the star ?"
    inputs = stock_inputs(processor, frames, question)
    visual = (inputs["mm_token_type_ids"][0] == 2).nonzero().squeeze(1)
    before, after = int(visual[0]), int(visual[-1]) + 1
    expected = torch.arange(inputs["input_ids"].shape[1]).repeat(3, 1, 1)
    step = torch.arange(after - before) // 4  # four tokens a step, two positions apart; two rows of two columns
    place = torch.arange(after - before) % 4
    expected[:, 0, before:after] = before + torch.stack((2 * step, place // 2, place % 2))
    expected[:, 0, after:] += int(expected[:, 0, before:after].max()) + 1 - after
    with torch.no_grad():
        stock = video_model(**inputs, position_ids=expected).logits[:, -1]
    with tieredkv.open_session(video_model, frames, gpu_kv_gb=1, processor=processor, fps=4) as session:
        assert_near(session_logits(session, question, 1), stock)


def test_bf16_stays_within_its_rounding(video_model, processor, frames):
    import copy

    model = copy.deepcopy(video_model).to(torch.bfloat16)
    question = "what colour was the star ?"
    inputs = stock_inputs(processor, frames, question)
    exact = stock_logits(video_model, inputs, 1)
    stock = stock_logits(model, inputs, 1).float()
    with tieredkv.open_session(model, frames, gpu_kv_gb=1, processor=processor, fps=4, positions="stock") as session:
        tiered = session_logits(session, question, 1)
    assert (tiered - exact).abs().mean() <= 1.5 * (stock - exact).abs().mean()


@pytest.mark.parametrize("known", [0, 900], ids=["all staged", "partly resident"])
def test_delayed_copies_change_nothing(llama, long_ids, known, monkeypatch):
    """With copies at random moments, no block is read too early or overwritten too soon."""
    import random
    import time

    from tieredkv.memory.host import HostLayer

    rng = random.Random(0)
    stage, write = HostLayer.stage, HostLayer.write

    def late(work):
        def run(*arguments):
            time.sleep(rng.choice([0, 0, 0.002]))
            return work(*arguments)

        return run

    stock = llama(long_ids).logits
    monkeypatch.setattr("tieredkv.planning.prefill_plan.STAGING_TOKENS", 64)
    monkeypatch.setattr(HostLayer, "stage", late(stage))
    monkeypatch.setattr(HostLayer, "write", late(write))
    options = {**pressed(llama, 900, 0.5), "chunk_tokens": 8, "text_window": 8, "prompt_tokens": known}
    with torch.no_grad(), tieredkv.use_attention(llama), TieredCache(llama.config, **tier_options(**options)) as cache:
        cache.expect(CONTEXT)
        parts = [llama(part, **cache_argument(cache)).logits for part in long_ids.split(70, dim=1)]
        assert cache.device_tier.streamed_bytes > 0
        resident = cache.device_tier.residents.get(0)
        assert (resident is not None and resident.length > 0) == (known > 0)
    assert_near(torch.cat(parts, dim=1), stock)
