"""Every text model that is supported on its own has the logits of stock transformers under a TieredCache."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import TEXT_CONFIGS, assert_near, random_text_model, stock_logits, text_config

import tieredkv
from tieredkv.cache.question import CONTEXT
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import UnsupportedModelError
from tieredkv.models import families
from tieredkv.models.kv_shape import model_shape

DECODERS = [kind for decoder in families.DECODERS if not decoder.video_only for kind in decoder.model_types]


@pytest.fixture(scope="module", params=DECODERS)
def model(request):
    return random_text_model(request.param)


def test_each_has_a_test_model():
    assert set(DECODERS) <= set(TEXT_CONFIGS)


@torch.no_grad()
def test_a_prompt_in_one_call_and_in_chunks_equals_stock(model, long_ids):
    ids = long_ids[:, :200]
    stock = model(ids).logits
    for chunks in ([200], [1, 2, 3, 4, 190], [63, 1, 66, 70], [150, *[1] * 50]):
        with tieredkv.use_attention(model), TieredCache(model.config, gpu_kv_gb=1) as cache:
            parts = [model(part, **cache_argument(cache)).logits for part in ids.split(chunks, dim=1)]
        ours = torch.cat(parts, dim=1)
        assert_near(ours, stock)
        assert float((ours - stock).abs().max()) < 1e-4


def test_each_question_is_answered_as_if_it_were_the_first(model, long_ids):
    context, tails = long_ids[:, :100], (long_ids[:, 300:309], long_ids[:, 400:450], long_ids[:, 300:309])
    with TieredCache(model.config, gpu_kv_gb=1) as cache, tieredkv.use_attention(model):
        cache.expect(CONTEXT)
        with torch.no_grad():
            for part in context.split(60, dim=1):
                model(part, **cache_argument(cache))
        cache.settle()
        answers = []
        for tail in tails:
            prompt = {"input_ids": torch.cat((context, tail), dim=1)}
            answers.append(stock_logits(model, prompt, 5, **cache_argument(cache)))
            cache.truncate(100)
    for tail, answer in zip(tails, answers, strict=True):
        assert_near(answer, stock_logits(model, {"input_ids": torch.cat((context, tail), dim=1)}, 5))


# ---- models that take images only


def with_images(kind):
    """The config of a model of this kind, with a text and a vision tower of a supported and of any kind."""
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    name, text, tower = {
        "gemma3": ("Gemma3Config", "gemma3_text", "siglip_vision_model"),
        "lfm2_vl": ("Lfm2VlConfig", "lfm2", "siglip2_vision_model"),
        "mistral3": ("Mistral3Config", "ministral3", "pixtral"),
    }[kind]
    return getattr(transformers, name)(
        text_config=text_config(text).to_dict(), vision_config={**vision, "model_type": tower}, image_token_id=96
    )


@pytest.mark.parametrize("kind", ["gemma3", "lfm2_vl", "mistral3"])
def test_a_model_for_images_is_refused_for_video_but_its_text_works(kind, long_ids):
    from transformers import AutoModelForImageTextToText

    config = with_images(kind)
    with pytest.raises(UnsupportedModelError, match=f"'{kind}' cannot be supported: its processor takes images but no"):
        families.video_family(config)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    prompt = {"input_ids": long_ids[:, :50].clamp(max=95)}
    with tieredkv.use_attention(model), TieredCache(config, gpu_kv_gb=1) as cache:
        ours = stock_logits(model, prompt, 4, **cache_argument(cache))
        assert cache.get_seq_length() == 53
    assert_near(ours, stock_logits(model, prompt, 4))


# ---- one window for all layers


@pytest.mark.parametrize("kind", ["mistral", "ministral3", "phi3"])
def test_a_window_in_every_layer_is_refused(kind):
    config = text_config(kind)
    config.sliding_window = 33
    for use in (TieredCache, lambda config: model_shape(config, torch.float32)):
        with pytest.raises(UnsupportedModelError, match=f"every layer of this {kind} sees only the last 33 tokens: it"):
            use(config)


@pytest.mark.parametrize("kind", ["mistral", "phi3"])
@torch.no_grad()
def test_a_window_that_no_context_fills_is_no_window(kind, long_ids):
    model = copy.deepcopy(random_text_model(kind))
    model.config.max_position_embeddings = model.config.sliding_window = 200
    stock = model(long_ids[:, :200]).logits
    with tieredkv.use_attention(model), TieredCache(model.config, gpu_kv_gb=1) as cache:
        parts = [model(part, **cache_argument(cache)).logits for part in long_ids[:, :200].split(90, dim=1)]
        assert_near(torch.cat(parts, dim=1), stock)
        with pytest.raises(UnsupportedModelError, match="the last 200 tokens, and a context of 201 was given"):
            model(long_ids[:, 200:201], **cache_argument(cache))


# ---- rotations that depend on the length


def rotated(kind, **rope):
    from transformers import AutoModelForCausalLM

    config = text_config(kind)
    config.original_max_position_embeddings = 64
    config.rope_parameters = {"rope_theta": 1e4, "partial_rotary_factor": 1.0, **rope}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def long_rope():
    """Other frequencies in contexts of more than 64 tokens."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [float(n) for n in range(1, 9)]}
    return rotated("phi3", rope_type="longrope", **factors)


@pytest.mark.parametrize(("total", "chunks"), [(64, [30, 33, 1]), (100, [65, 34, 1])])
@torch.no_grad()
def test_longrope_on_one_side_of_its_length_equals_stock(long_rope, long_ids, total, chunks):
    stock = long_rope(long_ids[:, :total]).logits
    with tieredkv.use_attention(long_rope), TieredCache(long_rope.config, gpu_kv_gb=1) as cache:
        parts = [long_rope(part, **cache_argument(cache)).logits for part in long_ids[:, :total].split(chunks, dim=1)]
    assert_near(torch.cat(parts, dim=1), stock)


@torch.no_grad()
def test_longrope_across_its_length_is_refused(long_rope, long_ids):
    with tieredkv.use_attention(long_rope), TieredCache(long_rope.config, gpu_kv_gb=1) as cache:
        long_rope(long_ids[:, :60], **cache_argument(cache))
        with pytest.raises(UnsupportedModelError, match="60 cached tokens cannot become 65: give the first 65 or more"):
            long_rope(long_ids[:, 60:65], **cache_argument(cache))


@torch.no_grad()
def test_longrope_is_not_truncated_across_its_length(long_rope, long_ids):
    """The keys that are left would have the rotations of a longer context."""
    long, short = long_rope(long_ids[:, :90]).logits[:, 70:], long_rope(long_ids[:, :50]).logits
    with tieredkv.use_attention(long_rope), TieredCache(long_rope.config, gpu_kv_gb=1) as cache:
        long_rope(long_ids[:, :100], **cache_argument(cache))
        with pytest.raises(
            UnsupportedModelError, match="100 cached tokens cannot be truncated to 40: only to 0, or to 65"
        ):
            cache.truncate(40)
        cache.truncate(70)
        assert_near(long_rope(long_ids[:, 70:90], **cache_argument(cache)).logits, long)
        cache.truncate(0)
        assert_near(long_rope(long_ids[:, :50], **cache_argument(cache)).logits, short)


def test_generate_of_phi_takes_a_long_prompt_whose_tokens_are_cached(long_rope, long_ids):
    """It drops an empty cache."""
    prompt = {"input_ids": long_ids[:, :100]}
    with tieredkv.use_attention(long_rope), TieredCache(long_rope.config, gpu_kv_gb=1) as cache:
        with torch.no_grad():
            long_rope(long_ids[:, :99], **cache_argument(cache))
        ours = stock_logits(long_rope, prompt, 4, **cache_argument(cache))
    assert_near(ours, stock_logits(long_rope, prompt, 4))


@torch.no_grad()
def test_dynamic_rotations_are_refused_above_the_models_length(long_ids):
    model = rotated("llama", rope_type="dynamic", factor=2.0)
    model.config.max_position_embeddings = 64
    with tieredkv.use_attention(model), TieredCache(model.config, gpu_kv_gb=1) as cache:
        model(long_ids[:, :64], **cache_argument(cache))
        with pytest.raises(UnsupportedModelError, match=r"above 64 tokens \(rope_type 'dynamic'\).* 65 was given"):
            model(long_ids[:, 64:65], **cache_argument(cache))
