"""Sessions of models with layers that cannot be truncated: every question as if it were the first, saved ones too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import build
from helpers import assert_near, random_text_model, session_logits, stock_inputs, stock_logits

import tieredkv
from tieredkv.cache.question import CONTEXT
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import SessionError
from tieredkv.models import families
from tieredkv.models.families.decoder import Decoder
from tieredkv.session import session_file
from tieredkv.storage import tensor_file

QUESTIONS = ("what is it ?", "and who is that ?", "what is it ?")


# ---- a video model, with windows that its kind is not released with


@pytest.fixture
def film():
    return np.random.default_rng(2).integers(0, 256, (23, 60, 90, 3), dtype=np.uint8)


@pytest.fixture
def windowed(monkeypatch):
    """Model and processor; the first layer and the last see 33 tokens."""
    from transformers import AutoModelForImageTextToText

    model, processor = build("qwen2_5_vl")
    config = type(model.config).from_dict(model.config.to_dict())
    config.text_config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    config.text_config.sliding_window, config.text_config.use_sliding_window = 33, True
    copy = AutoModelForImageTextToText.from_config(config).eval()
    copy.load_state_dict(model.state_dict())
    copy.generation_config.eos_token_id = None
    decoder = Decoder(("qwen2_5_vl_text",), untiered=("sliding_attention",))
    monkeypatch.setattr(families, "DECODERS", (decoder, *families.DECODERS))
    return copy, processor


def test_questions_to_a_session_equal_stock(windowed, film):
    model, processor = windowed
    options = {"gpu_kv_gb": 1, "fps": 4, "positions": "stock", "prefill_chunk": 17}
    with tieredkv.open_session(model, film, processor=processor, **options) as session:
        assert session.video.tokens > 66
        for question in QUESTIONS:
            stock = stock_logits(model, stock_inputs(processor, film, question), 5)
            assert_near(session_logits(session, question, 5), stock)
        assert "do not grow" in session.ask("what ?", max_new_tokens=2).stats.decode_path


def test_a_saved_session_answers_as_before(windowed, film, tmp_path):
    model, processor = windowed
    path, again = tmp_path / "film.tkv", tmp_path / "again.tkv"
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4) as session:
        session.ask(QUESTIONS[1], max_new_tokens=2)
        expected = [session_logits(session, question, 4) for question in QUESTIONS]
        session.save(path)
    with tieredkv.load_session(path, model, processor=processor) as session:
        assert all(torch.equal(session_logits(session, q, 4), e) for q, e in zip(QUESTIONS, expected, strict=True))
        session.save(again)
    with tieredkv.load_session(again, model, processor=processor) as session:
        assert torch.equal(session_logits(session, QUESTIONS[0], 4), expected[0])


# ---- caches of text models


@pytest.fixture(params=["gemma3_text", "gemma4_text", "qwen3_5_text", "lfm3"])
def model(request):
    return random_text_model(request.param)


@torch.no_grad()
def logits(model, cache, ids):
    """Of the last of several prompt tokens and of two single ones after them."""
    with tieredkv.use_attention(model):
        return torch.cat([model(part, **cache_argument(cache)).logits[:, -1] for part in ids.split([30, 1, 1], dim=1)])


@pytest.fixture
def saved(model, long_ids, tmp_path):
    """A file with the cache of 150 tokens, and the logits of 32 more."""
    path = tmp_path / "cache.tkv"
    with TieredCache(model.config, gpu_kv_gb=1) as cache:
        cache.expect(CONTEXT)
        with torch.no_grad(), tieredkv.use_attention(model):
            model(long_ids[:, :150], **cache_argument(cache))
        cache.settle()
        tensor_file.write(path, {"host": session_file.host_of(cache)}, session_file.cache_tensors(cache))
        return path, logits(model, cache, long_ids[:, 150:182])


def mapped(model, path):
    devices = [torch.device("cpu")] * model.config.num_hidden_layers
    tiers = tieredkv.TierConfig(gpu_kv_gb=1)
    return session_file.map_cache(tensor_file.read(path), model.config, tiers, 150, devices)


def test_a_cache_from_a_file_continues_and_goes_back(model, saved, long_ids):
    path, expected = saved
    stock = model(long_ids[:, :182]).logits[0, [179, 180, 181]].detach()
    with mapped(model, path) as cache:
        for _ in range(2):
            ours = logits(model, cache, long_ids[:, 150:182])
            assert_near(ours, expected)
            assert_near(ours, stock)
            cache.truncate(150)


def test_a_damaged_state_is_found_when_the_file_is_loaded(model, saved):
    path, _ = saved
    stored, content = tensor_file.read(path), bytearray(path.read_bytes())
    name = next(name for name in stored.names if name.startswith("untiered.000"))
    place = content.find(stored.tensor(name).numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(SessionError, match=r"damaged: 'untiered\.000"):
        mapped(model, path)


def test_a_file_without_states_is_refused(model, saved, tmp_path):
    stored = tensor_file.read(saved[0])
    tensors = {name: stored.tensor(name) for name in stored.names if name.startswith("layers.")}
    tensor_file.write(tmp_path / "old.tkv", stored.manifest, tensors)
    with pytest.raises(SessionError, match="no state of layers that do not grow: ingest"):
        mapped(model, tmp_path / "old.tkv")
