"""MiniCPM-V: tiles of large frames inside each step, and positions of 4.7 on a canvas for each frame."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import build, sampled_of
from helpers import assert_near, session_logits, stock_inputs, stock_logits

import tieredkv
from tieredkv.environment.versions import confuses_tiles
from tieredkv.errors import UnsupportedModelError
from tieredkv.models import families
from tieredkv.models.families.base import Slices

VERSIONS = pytest.mark.parametrize("name", ["minicpmv4_6", "minicpmv4_7"])
SIZES = {"whole": (60, 90), "2x3 tiles": (300, 380), "a row of tiles": (150, 290), "a column of tiles": (290, 150)}
QUESTIONS = ("what is it ?", "Zebra ?")
"""After the first, the tokenizer joins the newline after the video with the question; before the second it does not."""


def build_tiled(name: str):
    """`build`, for tests with tiles: skipped where transformers encodes these wrongly."""
    made = build(name)
    if confuses_tiles(name):
        pytest.skip("this transformers encodes tiles wrongly")
    return made


def frames(size: tuple[int, int], count: int = 3) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, *size, 3), dtype=np.uint8)


@VERSIONS
@pytest.mark.parametrize("size", ["2x3 tiles", "a column of tiles"])
def test_tiled_frames_have_the_logits_of_stock(name, size):
    model, processor = build_tiled(name)
    film = frames(SIZES[size])
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4, prefill_chunk=17) as session:
        assert session.video.slices is not None
        for question in QUESTIONS:
            stock = stock_logits(model, stock_inputs(processor, film, question), 2)
            assert_near(session_logits(session, question, 2), stock)


@VERSIONS
def test_four_times_the_tokens_have_the_logits_of_stock(name):
    model, processor = (copy.deepcopy(part) for part in build(name))
    film = frames((60, 90))
    model.config.downsample_mode = processor.video_processor.downsample_mode = "4x"
    model.model.config.downsample_mode = "4x"
    processor.video_token_divisor = 4
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4) as session:
        assert session.video.step_tokens > 6
        assert_near(
            session_logits(session, "what ?", 2), stock_logits(model, stock_inputs(processor, film, "what ?"), 2)
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_canvas_positions_are_those_of_transformers(size, question):
    model, processor = build("minicpmv4_7")
    film = frames(SIZES[size])
    inputs = stock_inputs(processor, film, question)
    keys = ("input_ids", "mm_token_type_ids", "target_sizes_videos")
    theirs, _ = model.model.get_rope_index(**{key: inputs[key] for key in keys})
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4) as session:
        head, grid = session.head_tokens, session.video
    family, tail = families.video_family(model.config), inputs["input_ids"][0, head + grid.tokens :].tolist()
    grid, total = replace(grid, trailing=family.trailing(model.config, tail)), inputs["input_ids"].shape[1]
    assert torch.equal(family.positions(model, head, grid, 0, total, "published"), theirs[:, 0])
    parts = [family.positions(model, head, grid, n, min(n + 7, total), "published") for n in range(0, total, 7)]
    assert torch.equal(torch.cat(parts, dim=1), theirs[:, 0])


@VERSIONS
def test_a_saved_session_of_tiled_frames_answers_as_before(name, tmp_path):
    model, processor = build_tiled(name)
    film = frames(SIZES["2x3 tiles"])
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4) as session:
        session.ask("what ?", max_new_tokens=2)
        expected, grid = session_logits(session, QUESTIONS[0], 3), session.video
        session.save(tmp_path / "film.tkv")
    with tieredkv.load_session(tmp_path / "film.tkv", model, processor=processor) as session:
        assert session.video == grid
        assert torch.equal(session_logits(session, QUESTIONS[0], 3), expected)


@VERSIONS
def test_a_plan_counts_tiles(name):
    model, processor = build_tiled(name)
    film = frames(SIZES["2x3 tiles"])
    plan = tieredkv.plan(model, film, gpu_kv_gb=1, processor=processor, fps=4, question_tokens=9)
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4) as session:
        assert plan.visual_tokens == session.video.visual_tokens == 3 * (6 + 6 * 6)
        assert plan.prompt_tokens == session.head_tokens + session.video.tokens + 9
        assert session.ask("what ?", max_new_tokens=2, evidence=True).evidence.heat.shape == (3,)


def test_visual_tokens_of_tiles_belong_to_their_frame():
    from tieredkv.evidence.moments import step_of
    from tieredkv.models.families.base import VideoGrid

    grid = VideoGrid(2, 1, 2, 1.0, ((), (7,)), slices=Slices(1, 2, 1, 1, ((8, 9), (9,))), trailing=1)
    assert grid.ids(0) == [0, 0, 8, 9, 0, 9, 0, 7, 0, 0, 8, 9, 0, 9, 0]
    assert (grid.tokens, grid.visual_tokens, grid.step_length) == (15, 8, 7)
    assert step_of(torch.arange(17), 1, grid).tolist() == [-1, 0, 0, -1, -1, 0, -1, 0, -1, 1, 1, -1, -1, 1, -1, 1, -1]


@VERSIONS
def test_settings_with_which_sizes_would_be_wrong_are_refused(name):
    model, processor = build(name)
    changed = copy.deepcopy(processor)
    changed.video_processor.downsample_mode = "4x"
    with pytest.raises(UnsupportedModelError, match=r"downsample_mode is '4x' and the model config's is '16x'"):
        tieredkv.open_session(model, frames((60, 90)), processor=changed, gpu_kv_gb=1)
    changed = copy.deepcopy(processor)
    changed.video_processor.stack_frames = 3
    with pytest.raises(UnsupportedModelError, match=r"stack_frames is 3: pictures composed of several frames are not"):
        tieredkv.open_session(model, frames((60, 90)), processor=changed, gpu_kv_gb=1)


def test_tiles_that_transformers_encodes_wrongly_are_refused(monkeypatch):
    """Before 5.19 the tower of 4.6 has a function for the one shape of all pictures."""
    from transformers.models.minicpmv4_6 import modeling_minicpmv4_6

    its = getattr(modeling_minicpmv4_6, "get_vision_merged_shape", None)
    monkeypatch.setattr(modeling_minicpmv4_6, "get_vision_merged_shape", its, raising=False)
    model, processor = build("minicpmv4_6")
    with pytest.raises(UnsupportedModelError, match=r"380x300 become tiles of another shape .* before 5\.19 encodes"):
        tieredkv.open_session(model, frames(SIZES["2x3 tiles"]), processor=processor, gpu_kv_gb=1)
    changed = copy.deepcopy(processor)
    changed.video_processor.max_slice_nums = 1
    with tieredkv.open_session(model, frames(SIZES["2x3 tiles"]), processor=changed, gpu_kv_gb=1, fps=4) as session:
        assert session.video.slices is None


def test_ids_of_markers_that_are_not_the_tokenizers_are_refused():
    model, processor = build("minicpmv4_7")
    config = copy.deepcopy(model.config)
    config.slice_end_id = None
    with pytest.raises(UnsupportedModelError, match=r"slice_end_id is None, but '</slice>' has the id \d+"):
        families.video_family(config).frame_grid(config, processor, sampled_of(5, 60, 90))


@VERSIONS
@torch.no_grad()
def test_places_of_patches_do_not_depend_on_the_default_dtype(name):
    """They are fractions of a side, and in bfloat16 they fall on other entries of the tower's table."""
    model, processor = build(name)
    processor = copy.deepcopy(processor)
    processor.video_processor.scale_resolution = 448
    family, film = families.video_family(model.config), frames((336, 448), 2)
    inputs = family.preprocessor(model.config, processor, sampled_of(*film.shape[:3]))(film)
    sizes = inputs["target_sizes_videos"]
    expected = model.model.get_video_features(inputs["pixel_values_videos"], sizes, return_dict=True).pooler_output
    assert torch.equal(family.encode(model, inputs), torch.cat(expected))
    try:
        torch.set_default_dtype(torch.bfloat16)
        features = family.encode(model, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(features, torch.cat(expected))
