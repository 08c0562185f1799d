"""VideoLLaMA3 leaves out visual tokens that hardly differ from the frame before, as transformers does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import build, sampled_of
from helpers import assert_near, session_logits, stock_inputs, stock_logits, tier_options

import tieredkv
from tieredkv.errors import SessionError
from tieredkv.models import families
from tieredkv.session.video_session import VideoSession

QUESTION = "what is it ?"


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    """Of two visual tokens a frame. Stills begin inside a segment of six frames, at its end, and last beyond one."""
    frames = np.random.default_rng(2).integers(0, 256, (23, 60, 90, 3), dtype=np.uint8)
    frames[2:4] = frames[2]
    frames[5:15] = frames[5]
    frames[8:12, :, 70:] = 7  # only the second token changes, and changes back
    frames[17:19] = frames[17]
    return frames


def open_film(film: np.ndarray, processor: object = None, **options: object) -> VideoSession:
    model, own = build("video_llama_3")
    options = {"gpu_kv_gb": 1, "fps": 4, "positions": "stock", **options}
    return tieredkv.open_session(model, film, processor=processor or own, **tier_options(**options))


def test_a_still_has_one_token_a_frame(film):
    with open_film(film) as session:
        assert session.video.lengths == (2, 2, 2, 1, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 2, 2, 2, 2)
        assert session.video.visual_tokens == 35


@pytest.mark.parametrize("batch", [2, 12, 46], ids=["a frame at a time", "segments", "one call"])
@pytest.mark.parametrize("theta", [0.0, 2.0], ids=["all static", "all dynamic"])
def test_a_film_with_stills_equals_stock(film, batch, theta):
    model, processor = build("video_llama_3")
    with open_film(film, encode_batch=batch, prefill_chunk=17, theta=theta) as session:
        stock = stock_logits(model, stock_inputs(processor, film, QUESTION), 5)
        assert_near(session_logits(session, QUESTION, 5), stock)


def test_the_prompt_of_a_film_with_stills_has_the_processors_tokens(film):
    _, processor = build("video_llama_3")
    theirs = stock_inputs(processor, film, QUESTION)["input_ids"][0].tolist()
    with open_film(film, encode_batch=12) as session:
        ours = session.video.ids(session.template.visual_id)
    head = theirs.index(session.template.visual_id)
    assert theirs[head : head + len(ours)] == ours


def test_without_compression_a_still_keeps_its_tokens(film):
    model, processor = build("video_llama_3")
    processor = copy.deepcopy(processor)
    processor.video_processor.use_token_compression = False
    stock = stock_logits(model, stock_inputs(processor, film, QUESTION), 3)
    with open_film(film, processor, encode_batch=12) as session:
        assert session.video.visual_tokens == 46
        assert_near(session_logits(session, QUESTION, 3), stock)


def test_a_saved_film_with_stills_answers_as_before(film, tmp_path):
    model, processor = build("video_llama_3")
    with open_film(film) as session:
        expected, grid = session_logits(session, QUESTION, 4), session.video
        session.save(tmp_path / "film.tkv")
    with tieredkv.load_session(tmp_path / "film.tkv", model, processor=processor) as session:
        assert session.video == grid
        assert_near(session_logits(session, QUESTION, 4), expected)


def test_a_plan_counts_the_most_tokens_that_a_film_can_have(film):
    model, processor = build("video_llama_3")
    assert tieredkv.plan(model, film, gpu_kv_gb=1, processor=processor, fps=4).visual_tokens == 46


def test_two_videos_at_once_are_compared_each_with_itself(film):
    model, processor = build("video_llama_3")
    family = families.video_family(model.config)
    first, second = (family.preprocessor(model.config, processor, sampled_of(*film.shape[:3])) for _ in range(2))
    kept = []
    for begin in range(0, len(film), 6):
        inputs = first(film[begin : begin + 6])
        second(film[:6])
        kept += family.lengths(inputs)
    assert tuple(kept) == family.lengths(
        family.preprocessor(model.config, processor, sampled_of(*film.shape[:3]))(film)
    )


@torch.no_grad()
def test_frames_of_long_films_are_as_small_as_in_one_call(film):
    """The processor's upper limit is for the whole video."""
    model, processor = build("video_llama_3")
    processor = copy.deepcopy(processor)
    processor.video_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 46}
    large = film.repeat(4, axis=1).repeat(4, axis=2)
    stock = stock_inputs(processor, large, QUESTION)
    with open_film(large, processor, encode_batch=12) as session:
        assert (session.video.rows, session.video.columns) == (1, 1)
        assert session.video.visual_tokens == int(stock["video_compression_mask"].sum())
        assert_near(session_logits(session, QUESTION, 3), stock_logits(model, stock, 3))


def test_moments_of_a_film_with_stills_are_those_of_its_frames(film):
    with open_film(film) as session:
        steps = session.video.step_of(torch.arange(session.video.tokens))[session.video.is_visual()]
        heat = session.ask(QUESTION, max_new_tokens=2, evidence=True).evidence.heat
    assert steps.bincount().tolist() == list(session.video.lengths)
    assert len(heat) == len(film)


def test_a_saved_session_is_refused_under_another_compression(film, tmp_path):
    model, processor = build("video_llama_3")
    with open_film(film) as session:
        session.save(tmp_path / "film.tkv")
    processor = copy.deepcopy(processor)
    processor.video_processor.use_token_compression = False
    with pytest.raises(SessionError, match="use_token_compression was true, is false"):
        tieredkv.load_session(tmp_path / "film.tkv", model, processor=processor)
