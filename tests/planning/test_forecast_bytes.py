"""Each phase of a cache holds and copies what was forecast, for models and settings of many shapes."""

from __future__ import annotations

import dataclasses
import weakref

import numpy as np
import pytest
import torch
from helpers import cap_share, pressed, random_text_model, tier_options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tieredkv
from tieredkv.api import new_session
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.config import TierConfig, tier_config
from tieredkv.environment.versions import cache_argument
from tieredkv.memory import ledger
from tieredkv.memory.arena import MemoryArena
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning import decode_plan, forecast_bytes, sizes
from tieredkv.planning.forecast import plan
from tieredkv.planning.prefill_plan import prompt_calls
from tieredkv.video.sampling import Sampling

QUESTION, NEW = "what colour was the star ?", 6
SMALL = {"chunk_tokens": 8, "text_window": 16, "recent_window": 8, "prefill_chunk": 64}


class Watch:
    """What a session's cache held: by purpose at the seal and at its peak, and the inputs and result of its plan."""

    def __init__(self, monkeypatch):
        self.most: dict[str, int] = {}
        self.prefill = 0
        self.sealed: dict[str, int] = {}
        self.host = 0
        """The most that all arenas took."""
        arenas, replace = weakref.WeakSet(), MemoryArena._replace
        reserve, seal, plan_decode = ledger.DeviceLedger.reserve, TieredCache.seal, decode_plan.plan_decode

        def watched_reserve(ledger, purpose, nbytes):
            reserve(ledger, purpose, nbytes)
            counted = ledger.by_purpose()
            self.most[purpose] = max(self.most.get(purpose, 0), counted[purpose])
            if not {"pool", "tables"} & set(counted):
                self.prefill = max(self.prefill, sum(counted.values()))

        def watched_replace(arena, records):
            replace(arena, records)
            arenas.add(arena)
            self.host = max(self.host, sum(each.nbytes for each in arenas))

        def watched_seal(cache):
            seal(cache)
            self.sealed = cache.ledger.by_purpose()

        def watched_plan(shape, tiers, layout, cap_bytes, scores, static, need=None, **how):
            decode = plan_decode(shape, tiers, layout, cap_bytes, scores, static, need, **how)
            self.planned = (shape, tiers, decode, static)
            return decode

        monkeypatch.setattr(ledger.DeviceLedger, "reserve", watched_reserve)
        monkeypatch.setattr(MemoryArena, "_replace", watched_replace)
        monkeypatch.setattr(TieredCache, "seal", watched_seal)
        monkeypatch.setattr(decode_plan, "plan_decode", watched_plan)


@pytest.mark.parametrize(("theta", "static_share"), [(0.0, 1.0), (0.18, None), (2.0, 0.0)])
@pytest.mark.parametrize(("share", "bits"), [(0.7, 16), (0.7, 4), (0.7, None), (3.0, None)])
def test_every_purpose_takes_what_the_plan_says(
    monkeypatch, video_model, processor, frames, theta, static_share, share, bits
):
    film = np.concatenate([frames, frames, frames])
    options = {"gpu_kv_gb": cap_share(video_model, 800, share), "policy": "paper", "theta": theta, **SMALL}
    options["host_kv_bits"] = bits
    watch = Watch(monkeypatch)
    with new_session(video_model, processor=processor, **tier_options(**options)) as session:
        session.ingest(film, Sampling(fps=4.0), question=QUESTION, max_new_tokens=NEW)
        answer = session.ask(QUESTION, max_new_tokens=NEW)
        tail = answer.stats.prompt_tokens - answer.stats.visual_tokens - session.head_tokens
        streamed = session.ingest_stats.streamed_bytes + session._cached.cache.device_tier.streamed_bytes
        digests = sum(layer.digests.packed.nbytes for layer in session._cached.cache.tiered_layers)
        host, host_bits = session._cached.cache.host_bytes, session._cached.cache.device_tier.host_bits
    real = forecast_bytes.decode_bytes(*watch.planned)
    assert (answer.stats.static_heads > 0, answer.stats.dynamic_heads > 0) == (theta < 2, theta > 0)
    memory_plan = plan(
        video_model,
        film,
        processor=processor,
        fps=4.0,
        question_tokens=tail,
        max_new_tokens=NEW,
        static_share=0.5 if static_share is None else static_share,
        **tier_options(**options),
    )
    pool = real["recent pages"] + real["static pages"] + real["retrieval pool"]
    assert pool == watch.sealed["pool"]
    for purpose in ("digests", "tables"):
        assert real[purpose] == watch.sealed.get(purpose, 0)
    assert real["ranking"] == watch.most.get("ranking", 0)
    assert real["attention"] == watch.most["scratch"]
    if static_share is not None:  # a forecast cannot know how far static heads' budgets differ
        assert memory_plan.decode == {
            **real,
            "tables": memory_plan.decode["tables"] if static_share else real["tables"],
        }
    assert memory_plan.prompt_tokens == answer.stats.prompt_tokens
    assert memory_plan.host_bits == host_bits == (bits or (16 if share > 1 else 8))
    assert sum(memory_plan.prefill.values()) == watch.prefill
    assert memory_plan.prefill["resident"] == watch.most.get("resident", 0)
    assert memory_plan.prefill_copy_bytes == streamed
    assert 0 <= memory_plan.file_bytes - host - digests < 0.05 * memory_plan.full_bytes
    assert watch.host + digests <= memory_plan.host_bytes


SHAPES = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.data())
@SHAPES
def test_a_prefill_holds_and_copies_what_is_forecast(video_model, processor, frames, data):
    c = data.draw(st.sampled_from([1, 4, 8, 32]))
    size, window = data.draw(st.integers(c, 150)), data.draw(st.integers(1, 40))
    share, words = data.draw(st.floats(0.3, 2)), data.draw(st.integers(1, 60))
    options = {"chunk_tokens": c, "prefill_chunk": size, "text_window": window, "recent_window": 8}
    options |= {"gpu_kv_gb": cap_share(video_model, 300, share), "top_k_ratio": data.draw(st.floats(0.01, 1))}
    options["host_kv_bits"] = data.draw(st.sampled_from([None, 16, 8, 4]))
    question = " ".join(["star"] * words)
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        with new_session(video_model, processor=processor, **tier_options(**options)) as session:
            try:
                session.ingest(frames[:80], Sampling(fps=4.0), question=question, max_new_tokens=1)
            except tieredkv.BudgetError:
                return
            prefix = session.head_tokens + session.video.tokens
            tokens = session.ask(question, max_new_tokens=1).stats.prompt_tokens
            streamed = session.ingest_stats.streamed_bytes + session._cached.cache.device_tier.streamed_bytes
            shape, tiers, bits = session._cached.cache.shape, session.tiers, session._cached.cache.device_tier.host_bits
    assert sum(forecast_bytes.prefill_bytes(shape, tiers, tokens, tokens - prefix, bits).values()) == watch.prefill
    assert forecast_bytes.prefill_copy_bytes(shape, tiers, tokens, tokens - prefix, bits) == streamed


@given(st.data())
@SHAPES
def test_decoding_holds_what_is_forecast(data):
    from transformers import LlamaConfig, LlamaForCausalLM

    kv_heads, head_dim = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([8, 16, 20]))
    heads = kv_heads * data.draw(st.integers(1, 3))
    layers, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 400))
    config = LlamaConfig(
        vocab_size=31, hidden_size=heads * head_dim, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, initializer_range=0.3,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    policies = [name for name in tieredkv.POLICIES if name != "full"]
    policy = dataclasses.replace(
        tieredkv.POLICIES[data.draw(st.sampled_from(policies))],
        theta=data.draw(st.sampled_from([0.0, 0.3, 2.0])),
        reuse_above=data.draw(st.sampled_from([0.5, 2.0])),
    )
    tiers = TierConfig(
        gpu_kv_gb=tokens * layers * kv_heads * 8 * head_dim / 2**30 + 1e-3,
        budget_ratio=data.draw(st.none() | st.floats(0.05, 1)),
        chunk_tokens=data.draw(st.sampled_from([1, 4, 8, 32])),
        pack_pages=data.draw(st.booleans()),
        host_kv_bits=data.draw(st.sampled_from([None, 16, 8, 4])),
        policy=policy,
    )
    torch.manual_seed(data.draw(st.integers(0, 9)))
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(31, (1, tokens))
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.no_grad(),
        tieredkv.use_attention(model),
        TieredCache(config, tiers, max_new_tokens=2) as cache,
    ):
        watch = Watch(patch)
        for part in (ids, ids[:, :1], ids[:, :1]):
            model(part, **cache_argument(cache))
    forecast = forecast_bytes.decode_bytes(*watch.planned)
    assert watch.sealed["pool"] == sum(forecast[name] for name in ("recent pages", "static pages", "retrieval pool"))
    for purpose, held in (("digests", watch.sealed), ("tables", watch.sealed), ("ranking", watch.most)):
        assert forecast[purpose] == held.get(purpose, 0), purpose
    assert forecast["attention"] == watch.most["scratch"]


# ---- heads assumed static


def test_heads_assumed_static_are_spread_over_the_layers():
    shape = KVShape(28, 28, 4, 128, 2)
    static = forecast_bytes.assumed_static(shape, TierConfig(), 0.5)
    assert static.sum(1).tolist() == [2] * 28
    assert torch.equal(forecast_bytes.assumed_static(shape, TierConfig(), 0.0), torch.zeros(28, 4, dtype=torch.bool))
    assert forecast_bytes.assumed_static(shape, TierConfig(), 1.0).all()


def test_layers_that_read_the_last_one_stream_and_read_it_again():
    model, tokens, asked = random_text_model("gemma4_text"), 600, 20
    chosen = {**pressed(model, tokens, 0.4), "chunk_tokens": 8, "text_window": 8, "prefill_chunk": 130}
    tiers, bits = tier_config(None, tier_options(**chosen, host_kv_bits=16)), 16
    ids = torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(0))
    with TieredCache(model.config, tiers, prompt_tokens=tokens + sizes.QUESTION_ROOM) as cache, torch.no_grad():
        with tieredkv.use_attention(model):
            cache.expect(CONTEXT)
            for call in prompt_calls(tiers, tokens, asked):
                if call.rows:
                    cache.expect(Question(max_new_tokens=1, prompt_tokens=tokens))
                model(ids[:, call.begin : call.stop], **cache_argument(cache))
        shape, streamed = cache.shape, cache.device_tier.streamed_bytes
    assert shape.readers == 2
    assert streamed == forecast_bytes.prefill_copy_bytes(shape, tiers, tokens, asked, bits)

    layout = sizes.lay_out(tiers, tokens, asked, 1)
    static = torch.zeros((shape.num_layers, shape.num_key_value_heads), dtype=torch.bool)
    given = tiers.cap_bytes, static.double(), static
    decoding = decode_plan.plan_decode(shape, tiers, layout, *given, host_bits=bits)
    alone = dataclasses.replace(shape, readers=0)
    (read, copied), once = (forecast_bytes.step_bytes(each, tiers, decoding, static, bits) for each in (shape, alone))
    assert copied == sum(once[1] // shape.num_layers for _ in range(shape.num_layers + shape.readers)) > 0
    assert read * shape.num_layers == once[0] * (shape.num_layers + shape.readers)
