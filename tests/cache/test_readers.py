"""Layers without keys and values of their own, which attend to those of an earlier layer."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_near, pressed, random_text_model, tier_options

import tieredkv
from tieredkv.cache.layer import TieredLayer
from tieredkv.cache.looks import Looks
from tieredkv.cache.prefill import TextRows
from tieredkv.cache.question import Question
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.models.kv_shape import model_shape
from tieredkv.session.step_graph import StepGraph

LAST, READERS = 1, (4, 5)
"""The tiered layer that is read, by its index among those, and the layers of the model that read it."""


@pytest.fixture(scope="module")
def gemma():
    model = random_text_model("gemma4_text")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("q_norm.weight"):  # sharper, so that layers differ in the chunks they choose
                weight.mul_(3)
    return model


def prompt_and_steps(model, cache, ids, prompt, steps=3):
    """Logits of the last prompt token and of `steps` more, each decoded alone."""
    with torch.no_grad(), tieredkv.use_attention(model):
        parts = ids[:, : prompt + steps].split([prompt] + [1] * steps, dim=1)
        return torch.cat([model(part, **cache_argument(cache)).logits[:, -1] for part in parts])


def test_only_layers_with_keys_and_values_of_their_own_count(gemma):
    shape = model_shape(gemma.config, torch.float32)
    assert (shape.num_layers, shape.num_key_value_heads, shape.head_dim) == (2, 1, 32)
    assert (shape.sliding_layers, shape.sliding_token_bytes) == (1, 2 * 2 * 16 * 4)
    with TieredCache(gemma.config, gpu_kv_gb=1) as cache:
        assert [layer.readers for layer in cache.tiered_layers] == [0, len(READERS)]
        assert len(cache.layers) == 3


def test_readers_choose_chunks_by_their_own_queries(gemma, long_ids):
    options = {**pressed(gemma, 300, 0.5), "theta": 2.0, "chunk_tokens": 8, "recent_window": 16, "text_window": 8}
    with TieredCache(gemma.config, **tier_options(**options)) as cache:
        cache.expect(Question(max_new_tokens=3, trace=True))
        prompt_and_steps(gemma, cache, long_ids, 300)
        trace = [each for each in cache.counters.trace if each.layer == LAST]
        counters = cache.counters
    assert len(trace) == 3 * (1 + len(READERS))
    sets = [frozenset(each.first_token.flatten().tolist()) for each in trace]
    by_layer = {tuple(sets[place :: 1 + len(READERS)]) for place in range(1 + len(READERS))}
    assert len(by_layer) == 1 + len(READERS)
    assert 0 < counters.resident < counters.selected


def test_tokens_known_in_advance_are_decoded_in_one_call(gemma, long_ids):
    stock = gemma(long_ids[:, :307]).logits[0, 300:]
    options = tier_options(gpu_kv_gb=1, theta=2.0, chunk_tokens=8)
    with TieredCache(gemma.config, **options, prompt_tokens=300) as cache:
        prompt_and_steps(gemma, cache, long_ids, 300, 0)
        cache.seal()
        with torch.no_grad(), tieredkv.use_attention(gemma), cache.forced():
            logits = gemma(long_ids[:, 300:307], **cache_argument(cache)).logits[0]
        assert cache.get_seq_length() == 307
    assert_near(logits, stock)


@pytest.mark.parametrize("keep", [1, 5])
def test_queries_of_the_last_tokens_alone(gemma, long_ids, keep):
    """As transformers passes them to readers where only these tokens' logits are wanted."""
    with torch.no_grad(), tieredkv.use_attention(gemma), TieredCache(gemma.config, gpu_kv_gb=1) as cache:
        gemma(long_ids[:, :100], **cache_argument(cache))
        got = gemma(long_ids[:, 100:130], **cache_argument(cache), logits_to_keep=keep).logits
    assert_near(got, gemma(long_ids[:, :130]).logits[:, -keep:])


def test_heads_are_scored_over_the_layer_and_its_readers(gemma, long_ids):
    with TieredCache(gemma.config, **tier_options(gpu_kv_gb=1, text_window=8, saliency_window=8)) as cache:
        prompt_and_steps(gemma, cache, long_ids, 300, 0)
        rows = cache.tiered_layers[LAST].rows
    gemma.set_attn_implementation("eager")
    try:
        attentions = gemma(long_ids[:, :300], output_attentions=True).attentions
    finally:
        gemma.set_attn_implementation("sdpa")
    attended = torch.stack([attentions[layer][0, :, -8:] for layer in (2, *READERS)])
    assert_near(rows.saliency[0], attended.mean((0, 1, 2)).detach())


def test_scores_of_a_group_are_joined_as_the_policy_says():
    def rows(score, attention):
        return TextRows(torch.tensor([score]), torch.full((2, 1, 3), attention), 4)

    own, first, second = rows(0.9, 0.3), rows(0.3, 0.6), rows(0.0, 0.0)
    mean = own.with_reader(first, 2, "mean").with_reader(second, 3, "mean")
    torch.testing.assert_close((mean.scores, mean.halves), (torch.tensor([0.4]), torch.full((2, 1, 3), 0.3)))
    assert own.with_reader(first, 2, "max").scores.item() == pytest.approx(0.9)


def test_looks_cover_readers(gemma, long_ids):
    looks = Looks(8)
    with TieredCache(gemma.config, **tier_options(gpu_kv_gb=1, theta=2.0, chunk_tokens=8)) as cache:
        cache.expect(Question(max_new_tokens=3, looks=looks))
        prompt_and_steps(gemma, cache, long_ids, 200, 0)
        prompt_and_steps(gemma, cache, long_ids[:, 200:], 30, 1)
    heads = gemma.config.num_attention_heads
    assert looks.heads == heads * (2 + len(READERS))
    assert 2 * heads < looks.question.sum(1).max() <= 1.001 * heads * (2 + len(READERS))


@pytest.mark.parametrize("broken", READERS)
@pytest.mark.parametrize("decoding", [False, True], ids=["prefill", "decoding"])
def test_a_call_interrupted_at_a_reader_is_noticed(gemma, long_ids, broken, decoding):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    tokens = 1 if decoding else 10
    with torch.no_grad(), tieredkv.use_attention(gemma), TieredCache(gemma.config, gpu_kv_gb=1) as cache:
        gemma(long_ids[:, :100], **cache_argument(cache))
        cache.settle()
        hook = gemma.model.layers[broken].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            gemma(long_ids[:, 100 : 100 + tokens], **cache_argument(cache))
        hook.remove()
        with pytest.raises(RuntimeError, match=r"did not run through all layers"):
            gemma(long_ids[:, 100:110], **cache_argument(cache))
        cache.truncate(100)
        got = gemma(long_ids[:, 100:110], **cache_argument(cache)).logits[:, -1]
    assert_near(got, gemma(long_ids[:, :110]).logits[:, -1])


def test_readers_read_what_is_staged_from_the_host(gemma, long_ids):
    """Under a cap that holds a part of the past on the device, and blocks of the rest."""
    options = {**pressed(gemma, 600, 0.4), "chunk_tokens": 8, "text_window": 8}
    with TieredCache(gemma.config, **tier_options(**options), prompt_tokens=600, max_new_tokens=4) as cache:
        got = []
        with torch.no_grad(), tieredkv.use_attention(gemma):
            for part in long_ids[:, :600].split(130, dim=1):
                got.append(gemma(part, **cache_argument(cache)).logits)
        assert cache.device_tier.streamed_bytes > 0
        assert cache.ledger.peak_bytes <= cache.tiers.cap_bytes
    assert_near(torch.cat(got, dim=1), gemma(long_ids[:, :600]).logits)


def test_digests_are_fitted_to_the_queries_of_readers_too(gemma, long_ids, monkeypatch):
    seen, attend = [], TieredLayer.attend

    def record(layer, query, *others):
        if layer.index == LAST:
            seen.append(query.flatten(0, 1))
        return attend(layer, query, *others)

    monkeypatch.setattr(TieredLayer, "attend", record)
    with torch.no_grad(), tieredkv.use_attention(gemma), TieredCache(gemma.config, gpu_kv_gb=1) as cache:
        for part in long_ids[:, :200].split(100, dim=1):
            gemma(part, **cache_argument(cache))
        moment = cache.tiered_layers[LAST].digests.query_moment[0]
    assert len(seen) == 2 * (1 + len(READERS))
    queries = torch.cat(seen)
    assert_near(moment, queries.T @ queries)


def test_steps_of_readers_are_not_captured(gemma, long_ids, monkeypatch):
    """A reader's step begins with counts kept in Python, which a graph would repeat as they were."""
    with torch.no_grad(), tieredkv.use_attention(gemma), TieredCache(gemma.config, gpu_kv_gb=1) as cache:
        gemma(long_ids[:, :100], **cache_argument(cache))
        cache.seal()
        monkeypatch.setattr(cache.untiered, "layers", ())
        steps = StepGraph(lambda token, place: token, cache, torch.device("cpu"), 1, 100)
    assert steps.path == "eager: the model has layers that read another layer's keys"
