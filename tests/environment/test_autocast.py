"""Autocast of a user's script: attention and cache take its dtype, as stock transformers' attention does."""

from __future__ import annotations

import asyncio

import pytest
import torch
from ambient_examples import OPTIONS, QUESTION, TIGHT
from helpers import random_text_model, session_logits, stock_inputs, stock_logits, tier_options

import tieredkv
from tieredkv import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.models.switch import use_attention

pytestmark = pytest.mark.setups


@pytest.fixture(scope="module")
def few(frames):
    return frames[:48]


AUTOCAST = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@AUTOCAST
@pytest.mark.parametrize("theta", [0.0, 2.0], ids=["all static", "all dynamic"])
def test_under_autocast_logits_equal_those_of_stock_under_autocast(video_model, processor, few, dtype, theta):
    inputs = stock_inputs(processor, few, QUESTION)
    exact = stock_logits(video_model, inputs, 1)
    options = {"processor": processor, "gpu_kv_gb": 1, "fps": 4, "positions": "stock", "theta": theta}
    with torch.autocast("cpu", dtype=dtype):
        stock = stock_logits(video_model, inputs, 1)
        with tieredkv.open_session(video_model, few, **tier_options(**options)) as session:
            ours = session_logits(session, QUESTION, 1)
            assert session._cached.cache.tiered_layers[0].host.dtype == dtype
    # They round in different places: ours is as near to stock as stock is to float32.
    assert float((ours - stock).norm()) <= 2 * float((exact - stock).norm())
    assert float((ours - stock).norm()) < 0.1 * float(stock.norm())


@AUTOCAST
def test_autocast_applies_in_background_threads(video_model, processor, few, dtype):
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, set()).add(out.dtype))
        for name, module in (
            ("tower", video_model.model.visual.blocks[0].mlp),
            ("decoder", video_model.model.language_model.layers[0].mlp),
        )
    ]
    try:
        with (
            torch.autocast("cpu", dtype=dtype),
            tieredkv.open_session(video_model, few, processor=processor, **tier_options(**TIGHT)) as session,
        ):
            plain = session.ask(QUESTION, **OPTIONS).token_ids
            with session.ask(QUESTION, stream=True, **OPTIONS) as stream:
                list(stream)
            assert stream.generation.token_ids == plain
            assert asyncio.run(session.aask(QUESTION, **OPTIONS)).token_ids == plain
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == {"tower": {dtype}, "decoder": {dtype}}


def test_autocast_may_begin_or_end_between_video_and_question(video_model, processor, few, tmp_path):
    for first, later in ((True, False), (False, True)):
        with torch.autocast("cpu", enabled=first):
            session = tieredkv.open_session(video_model, few, processor=processor, **tier_options(**TIGHT))
        with session, torch.autocast("cpu", enabled=later):
            assert session.ask(QUESTION, **OPTIONS).stats.new_tokens == 4
            session.save(tmp_path / "session.tkv")
        with torch.autocast("cpu", enabled=first):
            loaded = tieredkv.load_session(tmp_path / "session.tkv", video_model, processor=processor)
            with loaded:
                assert loaded.ask(QUESTION, **OPTIONS).stats.new_tokens == 4


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_cache_under_autocast_stores_the_dtype_of_attention(long_ids, kind):
    model = random_text_model(kind)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        stock = model(long_ids[:, :200]).logits.float()
        with use_attention(model), TieredCache(model.config, gpu_kv_gb=1, chunk_tokens=8) as cache:
            parts = [model(part, **cache_argument(cache)).logits for part in long_ids[:, :200].split(50, dim=1)]
            assert cache.tiered_layers[0].host.dtype == torch.bfloat16
    exact = model(long_ids[:, :200]).logits.detach()
    assert float((torch.cat(parts, 1) - stock).norm()) <= 2 * float((exact - stock).norm())
