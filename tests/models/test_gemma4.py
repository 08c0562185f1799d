"""Gemma 4's kinds: layers' own embeddings, shared keys and values, frames that see themselves whole, experts."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from families import build, gemma4, sampled_of, sharpened
from helpers import (
    assert_near,
    random_text_model,
    session_logits,
    stock_inputs,
    stock_logits,
    text_config,
    tier_options,
)

import tieredkv
from tieredkv.cache.prefill import _runs
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.environment.versions import cache_argument
from tieredkv.errors import OptionError, UnsupportedModelError
from tieredkv.models.families import video_family
from tieredkv.models.families.base import Slices, VideoGrid
from tieredkv.models.families.gemma4 import _ahead, _digits, _number
from tieredkv.models.kv_shape import model_shape

KINDS = {
    "E2B, E4B": {"whole_frames": False, "experts": False},
    "26B-A4B": {"own_embeddings": False, "shared": False},
    "31B": {"own_embeddings": False, "shared": False, "experts": False},
}
QUESTION = "what is it ?"


@cache
def released(kind):
    return sharpened(lambda: gemma4(**KINDS[kind]))


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (11, 60, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [{}, {"prefill_chunk": 17, "encode_batch": 10}], ids=["one call", "chunks"])
def test_each_released_kind_equals_stock(kind, film, chunks):
    model, processor = released(kind)
    options = {"gpu_kv_gb": 1, "fps": 4, "positions": "stock", "theta": 2.0, **chunks}
    stock = stock_logits(model, stock_inputs(processor, film, QUESTION), 4)
    with tieredkv.open_session(model, film, processor=processor, **tier_options(**options)) as session:
        assert_near(session_logits(session, QUESTION, 4), stock)


# ---- frames that see themselves whole


def calls_of(model):
    """Tokens of each call of the decoder from now on, and a hook to remove."""
    tokens: list[int] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, options: tokens.append(options["inputs_embeds"].shape[1]), with_kwargs=True
    )
    return tokens, hook


@pytest.mark.parametrize("chunk", [1, 17, 40])
def test_no_call_splits_a_frame(film, chunk):
    model, processor = released("31B")
    tokens, hook = calls_of(model)
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4, prefill_chunk=chunk) as session:
        hook.remove()
        grid, head = session.video, session.head_tokens
    ends = np.cumsum(tokens)
    assert ends[-1] == head + grid.tokens
    for start in (grid.starts() + head).tolist():
        assert not any(start < end < start + grid.step_tokens for end in ends)
    assert max(tokens) <= max(chunk, grid.step_tokens)


def test_calls_of_models_whose_frames_do_not_see_ahead_are_full(film):
    model, processor = released("E2B, E4B")
    tokens, hook = calls_of(model)
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4, prefill_chunk=17):
        hook.remove()
    assert set(tokens[:-1]) == {17}


@pytest.mark.parametrize(
    ("index", "begin", "end"),
    [
        (7, 6, 7),  # in the text before a step
        (0, -9, 0),  # at the start of the first
        (4, 0, 6),  # inside a step, which then goes whole
        (4, -9, 0),  # inside a step, before which there is something
        (6, 0, 6),  # at the end of a step
        (8, 6, 8),  # at the start of the second
        (9, 6, 8),
        (9, 8, 14),
        (20, 14, 20),  # after the video
    ],
)
def test_calls_end_between_steps(index, begin, end):
    grid = VideoGrid(2, 2, 3, 1.0, ((), (1, 2)))  # tokens 0-5 and 8-13
    assert grid.between_steps(index, begin) == end


def test_a_visual_token_sees_the_rest_of_its_frame():
    visual = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 1]], dtype=torch.bool)
    assert _ahead(visual).flatten().tolist() == [1, 0, 0, 0, 2, 1, 0, 0, 0]


@pytest.mark.parametrize("rows", [3, 1024])
def test_windows_with_tokens_ahead_equal_a_mask(rows, monkeypatch):
    monkeypatch.setattr("tieredkv.cache.sliding_layer.ROWS", rows)
    torch.manual_seed(0)
    model = random_text_model("gemma3_text")
    with TieredCache(model.config, gpu_kv_gb=1) as held:
        layer, m, n = held.layers[0], 60, 50
        query, keys, values = torch.randn(4, n, 16), torch.randn(2, m, 16), torch.randn(2, m, 16)
        ahead = torch.zeros(n, dtype=torch.int32)
        ahead[20:44] = torch.arange(23, -1, -1)
        out = layer.attend(query, keys, values, 0.3, ahead)
        distance = torch.arange(m - n, m)[:, None] - torch.arange(m)
        seen = (distance < layer.sliding_window) & (distance >= -ahead[:, None])
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0), attn_mask=seen, scale=0.3
    )
    assert_near(out, expected)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_other_masks_are_still_refused(kind):
    model, _ = build("gemma4")
    mask = torch.ones((1, 1, 8, 8), dtype=torch.bool).tril()
    ids, masks = torch.arange(1, 9).unsqueeze(0), {"full_attention": None, "sliding_attention": None, kind: mask}
    with (
        torch.no_grad(),
        tieredkv.use_attention(model),
        TieredCache(model.config, gpu_kv_gb=1) as held,
        pytest.raises(OptionError, match="takes no prepared attention mask"),
    ):
        model.model.language_model(ids, attention_mask=masks, **cache_argument(held))


def test_text_alone_through_a_cache_equals_stock(long_ids):
    """A model whose frames see themselves whole, without any frame."""
    model, _ = released("31B")
    ids = long_ids[:, :200].clamp(min=1)
    with tieredkv.use_attention(model), TieredCache(model.config, gpu_kv_gb=1) as held:
        ours = stock_logits(model, {"input_ids": ids}, 4, **cache_argument(held))
    assert_near(ours, stock_logits(model, {"input_ids": ids}, 4))


def test_frames_through_generate_are_refused_where_they_see_ahead(film):
    """There, nothing tells which calls hold whole frames."""
    model, processor = released("31B")
    inputs = stock_inputs(processor, film, QUESTION)
    with (
        tieredkv.use_attention(model),
        TieredCache(model.config, gpu_kv_gb=1) as held,
        pytest.raises(UnsupportedModelError, match="changes its causal mask"),
    ):
        model.generate(**inputs, **cache_argument(held), max_new_tokens=2)


@pytest.mark.parametrize(
    ("ahead", "runs"),
    [
        ([0, 0, 0], [(0, 3, False)]),
        ([2, 1, 0, 0, 1, 0], [(0, 3, True), (3, 4, False), (4, 6, True)]),
        ([0, 1, 0, 1, 0, 0], [(0, 1, False), (1, 3, True), (3, 5, True), (5, 6, False)]),
    ],
)
def test_runs_cover_all_tokens(ahead, runs):
    assert _runs(ahead) == runs


def test_frames_longer_than_the_window_are_refused_where_they_see_each_other_beyond_it(film):
    model, processor = build("gemma4_unified")
    config = copy.deepcopy(model.config)
    config.text_config.sliding_window = 5
    with pytest.raises(ValueError, match="6 tokens of a frame are more than the model's window of 5"):
        video_family(config).frame_grid(config, processor, sampled_of(1, 60, 90))


# ---- ids beside embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ids_survive_as_digits(dtype):
    ids = torch.cat((torch.arange(3000), torch.tensor([262_143, 262_144, 2**21 - 1]))).unsqueeze(0)
    assert torch.equal(_number(_digits(ids).to(dtype)), ids)


# ---- what is refused


def test_a_model_in_which_all_tokens_see_each_other_is_refused():
    config = text_config("gemma4_text")
    config.use_bidirectional_attention = "all"
    with pytest.raises(UnsupportedModelError, match="needs no tiers"):
        TieredCache(config, gpu_kv_gb=1)


def test_full_layers_of_several_sizes_are_refused():
    config = text_config("gemma4_text")
    sizes = {layer: {"head_dim": 32, "num_key_value_heads": 1} for layer in (0, 2, 4, 5)}
    sizes[2] = {"head_dim": 64, "num_key_value_heads": 1}
    config.per_layer_config = sizes
    with pytest.raises(UnsupportedModelError, match="full_attention with 1 KV heads of 32 and 1 KV heads of 64"):
        model_shape(config, torch.float32)


@pytest.mark.parametrize(("lengths", "slices"), [((7, 6), None), ((), Slices(1, 1, 1, 1, ((3, 4),)))])
def test_calls_end_after_all_tokens_of_a_step(lengths, slices):
    grid = VideoGrid(2, 2, 3, 1.0, ((), (1, 2)), lengths=lengths, slices=slices)
    whole = 7 if lengths else 9  # in place of the 6 of 2 x 3
    assert grid.between_steps(6, 0) == whole
    assert grid.between_steps(whole, 0) == whole
