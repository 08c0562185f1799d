"""Molmo2 is refused: its frames attend to later ones, so none can be cached before the whole video has been read."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import QWEN_TEMPLATE, TEXT, tokenizer
from helpers import stock_inputs

import tieredkv
from tieredkv.errors import UnsupportedModelError

pytestmark = pytest.mark.skipif(not hasattr(transformers, "Molmo2Config"), reason="this transformers has no Molmo2")

NAMES = ("im_patch", "im_col", "im_start", "low_res_im_start", "frame_start", "im_end", "frame_end", "im_low")


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (5, 60, 90, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def molmo() -> tuple[Any, Any]:
    own = copy.deepcopy(tokenizer())
    own.add_tokens([f"<{name}>" for name in NAMES], special_tokens=True)
    ids = {name: own.convert_tokens_to_ids(f"<{name}>") for name in NAMES}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.Molmo2Config(
        text_config={**TEXT, "head_dim": 16, "vocab_size": len(own), "additional_vocab_size": 0},
        vision_config={**tower, "head_dim": 16, "num_hidden_layers": 2, "image_size": [42, 42]},
        adapter_config={**tower, "head_dim": 16, "vision_feature_layer": [1, 0], "text_hidden_size": 64},
        image_patch_id=ids["im_patch"],
        frame_start_token_id=ids["frame_start"],
        frame_end_token_id=ids["frame_end"],
    )
    processor = transformers.Molmo2Processor(
        image_processor=transformers.Molmo2ImageProcessor(),
        video_processor=transformers.Molmo2VideoProcessor(size={"height": 42, "width": 42}),
        tokenizer=own,
        chat_template=QWEN_TEMPLATE.replace("VIDEO", "<video>"),
    )
    torch.manual_seed(3)
    return transformers.Molmo2ForConditionalGeneration(config).eval(), processor


@torch.no_grad()
def test_its_first_frame_attends_to_its_last(molmo, film):
    """Why it is refused. Once this fails, with a release in which frames attend backwards only, it can be supported."""
    model, processor = molmo
    other = film.copy()
    other[-1] = 255 - other[-1]
    first, second = (model.model(**stock_inputs(processor, each, "?")).last_hidden_state for each in (film, other))
    ids = stock_inputs(processor, film, "?")["input_ids"][0]
    start = int((ids == model.config.frame_start_token_id).nonzero()[0])
    assert torch.equal(first[:, :start], second[:, :start]), "text before the video changes"
    assert (first - second)[:, start : start + 3].abs().max() > 1e-4


REASON = r"'molmo2(_text)?' cannot be supported: .*attend to .*later frames"


def test_it_is_refused_with_the_reason(molmo, film):
    model, processor = molmo
    with pytest.raises(UnsupportedModelError, match=REASON):
        tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4)
    with pytest.raises(UnsupportedModelError, match=REASON):
        tieredkv.plan(model.config, 100, gpu_kv_gb=1)
    with pytest.raises(UnsupportedModelError, match=REASON):
        tieredkv.TieredCache(model.config, tieredkv.TierConfig(gpu_kv_gb=1))
