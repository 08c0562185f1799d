"""`max_pixels`: every family gives the frames that stock transformers gives under equal limits."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from families import BUILD, build, sampled_of
from helpers import assert_near, session_logits, stock_inputs, stock_logits
from transformers.models.gemma4 import video_processing_gemma4

import tieredkv
from tieredkv.errors import OptionError
from tieredkv.models import families

FRAMES, HEIGHT, WIDTH = 23, 340, 510
LIMIT = 28 * 28 * 14
QUESTION = "what is it ?"
A_FRAME = {"size": {"shortest_edge": 1, "longest_edge": LIMIT}, "cap_pixels_per_frame": False}
WHOLE_VIDEO = {"size": {"shortest_edge": 1, "longest_edge": LIMIT * FRAMES}, "cap_pixels_per_frame": False}
STOCK: dict[str, tuple[int, dict[str, Any]]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), (LIMIT, A_FRAME)),
    **dict.fromkeys(("qwen3_vl", "qwen3_5", "qwen3_5_moe", "lfm3_vl"), (LIMIT, WHOLE_VIDEO)),
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "video_llama_3"), (LIMIT, {"size": WHOLE_VIDEO["size"]})),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7"), (5 * 140 * 140, {"max_slice_nums": 4})),
    **dict.fromkeys(("gemma4", "gemma4_unified"), (14 * 14 * 9, {"max_soft_tokens": 7})),
}
"""A limit for each family, and the options of its processor that state the same."""
FIXED = sorted(set(BUILD) - set(STOCK))


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    small = np.random.default_rng(5).integers(0, 256, (FRAMES, 22, 32, 3), dtype=np.uint8)
    return small.repeat(16, axis=1)[:, :HEIGHT].repeat(16, axis=2)[:, :, :WIDTH]


def limited(processor: Any, options: dict[str, Any]) -> Any:
    """A copy of a processor with other limits."""
    processor = copy.copy(processor)
    processor.video_processor = copy.copy(processor.video_processor)
    for name, value in options.items():
        kind = type(getattr(processor.video_processor, name))
        setattr(processor.video_processor, name, kind(**value) if isinstance(value, dict) else value)
    return processor


@pytest.mark.parametrize(
    ("name", "limit", "options"),
    [
        *((name, *case) for name, case in STOCK.items()),
        ("minicpmv4_6", 112 * 112, {"max_slice_nums": 1, "scale_resolution": 112}),
        ("gemma4", 14 * 14 * 6, {"max_soft_tokens": 5}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_answers_are_those_of_stock_with_its_limits(name, limit, options, film, monkeypatch):
    model, processor = build(name)
    if name == "gemma4":  # stock refuses other numbers
        monkeypatch.setattr(video_processing_gemma4, "_SUPPORTED_SOFT_TOKENS", (5, 7, 20))
    if name.startswith("minicpm"):  # all pictures of one shape: transformers before 5.19 encodes no others
        film = np.ascontiguousarray(film[:, :, :HEIGHT])
    before = processor.video_processor.to_dict()
    stock = stock_logits(model, stock_inputs(limited(processor, options), film, QUESTION), 3)
    with tieredkv.open_session(
        model, film, processor=processor, gpu_kv_gb=1, fps=4, positions="stock", max_pixels=limit
    ) as session:
        assert_near(session_logits(session, QUESTION, 3), stock)
        tokens = session.video.visual_tokens
    assert processor.video_processor.to_dict() == before
    assert tieredkv.plan(model, film, gpu_kv_gb=1, processor=processor, fps=4, max_pixels=limit).visual_tokens == tokens


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_segments_have_the_features_of_the_whole(name, film):
    model, processor = build(name)
    family = families.video_family(model.config)
    sampled = sampled_of(*film.shape[:3], STOCK[name][0])
    preprocess, whole = (family.preprocessor(model.config, processor, sampled) for _ in range(2))
    segments = [family.encode(model, preprocess(film[begin : begin + 6])) for begin in range(0, FRAMES, 6)]
    assert_near(torch.cat(segments), family.encode(model, whole(film)))


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("size", [(240, 360), (100, 100), (90, 400)], ids=str)
def test_frames_have_at_most_max_pixels_and_are_not_enlarged(name, size):
    model, processor = build(name)
    family = families.video_family(model.config)
    height, width = size
    edge = family.tower_size(model.config, processor, 1, 1)[0]
    for limit in (14 * 14 * 8, 28 * 28 * 3, 28 * 28 * 30, 10 * 140 * 140):
        try:
            steps, rows, columns = family.frame_grid(model.config, processor, sampled_of(9, height, width, limit))
        except OptionError:  # the least that it takes: below
            continue
        assert steps == -(-9 // family.step_frames(model.config))
        assert math.prod(family.tower_size(model.config, processor, rows, columns)) <= limit
        assert rows * edge < height + edge
        assert columns * edge < width + edge


@pytest.mark.parametrize("name", STOCK)
def test_too_few_pixels_are_refused_with_the_fewest_that_work(name, film):
    model, processor = build(name)
    options = {"processor": processor, "gpu_kv_gb": 1, "fps": 4}
    with pytest.raises(OptionError, match=r"max_pixels=256 is too few for frames of 510x340.* Give max_") as refusal:
        tieredkv.plan(model, film, **options, max_pixels=256)
    least = int(str(refusal.value).rpartition("max_pixels=")[2].split()[0])
    tieredkv.plan(model, film, **options, max_pixels=least)
    with pytest.raises(OptionError, match="is too few"):
        tieredkv.plan(model, film, **options, max_pixels=least - 1)


def test_gemma_takes_the_fewest_tokens_that_do_not_shrink_a_frame(monkeypatch):
    model, processor = build("gemma4")
    monkeypatch.setattr(video_processing_gemma4, "_SUPPORTED_SOFT_TOKENS", (4, 9, 25, 100))
    family = families.video_family(model.config)

    def tokens(edge: int, limit: int) -> int:
        _, rows, columns = family.frame_grid(model.config, processor, sampled_of(1, edge, edge, limit))
        return rows * columns

    assert tokens(42, 14 * 14 * 100) == 9  # as large as it is, though the limit allows more
    assert tokens(42, 14 * 14 * 8) == 4
    assert tokens(700, 14 * 14 * 30) == 25


def test_thin_frames_need_more_pixels_than_a_square():
    model, processor = build("qwen2_5_vl")
    family = families.video_family(model.config)
    with pytest.raises(OptionError, match="is too few for frames of 1900x30") as refusal:
        family.frame_grid(model.config, processor, sampled_of(8, 30, 1900, 28 * 28))
    least = int(str(refusal.value).rpartition("max_pixels=")[2].split()[0])
    _, rows, columns = family.frame_grid(model.config, processor, sampled_of(8, 30, 1900, least))
    assert rows * columns * 28 * 28 <= least


@pytest.mark.parametrize("name", FIXED)
def test_families_with_one_frame_size_refuse_it_by_name(name, film):
    model, processor = build(name)
    message = f"frames of {name} models have one fixed size. Leave it out, and lower fps"
    with pytest.raises(OptionError, match=message):
        tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4, max_pixels=LIMIT)


def test_a_limit_for_the_whole_video_does_not_apply_besides(film):
    model, processor = build("qwen2_5_vl")
    capped = limited(processor, {"cap_pixels_per_frame": True, "max_video_tokens": 30})
    options = {"gpu_kv_gb": 1, "fps": 4, "max_pixels": LIMIT}
    plain, same = (tieredkv.plan(model, film, processor=one, **options) for one in (processor, capped))
    assert same.grid == plain.grid
    assert tieredkv.plan(model, film, processor=capped, gpu_kv_gb=1, fps=4).visual_tokens < plain.visual_tokens
