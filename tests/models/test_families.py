"""Every video family has the logits of stock transformers, in one call and in chunks, for several questions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import BUILD, build, sampled_of
from helpers import assert_near, pressed, session_logits, stock_inputs, stock_logits, tier_options

import tieredkv
from tieredkv.errors import UnsupportedModelError
from tieredkv.models import families
from tieredkv.models.families.base import VideoGrid

FAMILIES = pytest.mark.parametrize("name", BUILD)
TIMESTAMPED = pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5", "qwen3_5_moe"])
PICTURES = pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5", "qwen3_5_moe", "glm4v", "glm46v", "glm4v_moe"])
"""Families that number each step as a picture."""
QUESTIONS = ("what is it ?", "and who is that ?")


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    """An odd number of frames, so that the last temporal step of families that take two is incomplete."""
    return np.random.default_rng(2).integers(0, 256, (23, 60, 90, 3), dtype=np.uint8)


@FAMILIES
@pytest.mark.parametrize("chunks", [{}, {"prefill_chunk": 17, "encode_batch": 10}], ids=["one call", "chunks"])
@pytest.mark.parametrize("theta", [0.0, 2.0], ids=["all static", "all dynamic"])
def test_two_questions_equal_stock(name, film, chunks, theta):
    model, processor = build(name)
    options = {"gpu_kv_gb": 1, "fps": 4, "positions": "stock", "theta": theta, **chunks}
    with tieredkv.open_session(model, film, processor=processor, **tier_options(**options)) as session:
        for question in QUESTIONS:
            stock = stock_logits(model, stock_inputs(processor, film, question), 5)
            assert_near(session_logits(session, question, 5), stock)


@FAMILIES
def test_a_conversation_equals_stock(name, film):
    model, processor = build(name)
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4, positions="stock") as session:
        first = session.chat(QUESTIONS[0], max_new_tokens=4).text
        inputs = stock_inputs(processor, film, QUESTIONS[1], earlier=[(QUESTIONS[0], first)])
        stock = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert session.chat(QUESTIONS[1], max_new_tokens=4).token_ids == stock.tolist()


@FAMILIES
def test_the_prompt_has_the_processors_tokens(name, film):
    model, processor = build(name)
    theirs = stock_inputs(processor, film, QUESTIONS[0])["input_ids"][0].tolist()
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4, positions="stock") as session:
        template = session.template
        head, tail = template.around_video([(QUESTIONS[0], None)])
        sampled, grid = sampled_of(*film.shape[:3]), session.video
        head_ids = template.head_ids(model.config, head, sampled)[0].tolist()
        last = sampled.times(grid.steps - 1, grid.frames_per_step)
        ours = [*head_ids, *grid.ids(template.visual_id), *template.tail_ids(tail, last, grid.slices)[0].tolist()]
    assert ours == theirs


@FAMILIES
@torch.no_grad()
def test_segments_have_the_features_of_the_whole(name, film):
    model, processor = build(name)
    family = families.video_family(model.config)
    preprocess, whole = (family.preprocessor(model.config, processor, sampled_of(*film.shape[:3])) for _ in range(2))
    segments = [family.encode(model, preprocess(film[begin : begin + 6])) for begin in range(0, len(film), 6)]
    assert_near(torch.cat(segments), family.encode(model, whole(film)))


@FAMILIES
def test_a_plan_counts_the_tokens_of_the_session(name, film):
    model, processor = build(name)
    plan = tieredkv.plan(model, film, gpu_kv_gb=1, processor=processor, fps=4, question_tokens=9)
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4) as session:
        assert plan.visual_tokens == session.video.visual_tokens
        assert plan.video_text_tokens == session.video.tokens - session.video.visual_tokens
        assert plan.prompt_tokens == session.head_tokens + session.video.tokens + 9


@FAMILIES
def test_a_saved_session_answers_as_before(name, film, tmp_path):
    model, processor = build(name)
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4) as session:
        session.ask(QUESTIONS[1], max_new_tokens=2)
        expected = session_logits(session, QUESTIONS[0], 4)
        session.save(tmp_path / "film.tkv")
    with tieredkv.load_session(tmp_path / "film.tkv", model, processor=processor) as session:
        assert_near(session_logits(session, QUESTIONS[0], 4), expected)


@FAMILIES
def test_a_small_cap_holds(name, film):
    model, processor = build(name)
    options = {"processor": processor, "fps": 4, "chunk_tokens": 8, "prefill_chunk": 64, "text_window": 8}
    longer = film.repeat(6, axis=0)
    tokens = tieredkv.plan(model, longer, gpu_kv_gb=1, processor=processor, fps=4).prompt_tokens
    with tieredkv.open_session(model, longer, **pressed(model, tokens, 0.5), **tier_options(**options)) as session:
        stats = session.ask(QUESTIONS[0], max_new_tokens=6).stats
    assert stats.kv_device_peak_bytes <= stats.kv_cap_bytes < stats.kv_full_bytes


@TIMESTAMPED
def test_timestamped_families_follow_their_authors_by_default(name, film):
    """Each step has its own vision tokens; transformers 5.x also keeps those of the template around the video."""
    model, processor = build(name)
    inputs = stock_inputs(processor, film, QUESTIONS[0])
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert "user\n<|vision_start|><0.1 seconds><|vision_start|><|video_pad|>" in text
    assert "<|video_pad|><|vision_end|><|vision_end|>what" in text
    text = text.replace("user\n<|vision_start|>", "user\n").replace("<|vision_end|><|vision_end|>", "<|vision_end|>")
    ids = processor.tokenizer(text, return_tensors="pt").input_ids
    inner = {"input_ids": ids, "mm_token_type_ids": 2 * (ids == processor.video_token_id).int()}
    pixels = {key: inputs[key] for key in ("pixel_values_videos", "video_grid_thw")}
    with torch.no_grad():
        stock = model(**inner, **pixels).logits[:, -1]
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4) as session:
        assert_near(session_logits(session, QUESTIONS[0], 1), stock)


@PICTURES
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_positions_of_steps_as_pictures_in_chunks_equal_those_of_the_whole(name, chunk):
    model, _ = build(name)
    between = ((), (1, 2), (1, 2, 3), (4,), (1, 2, 3, 4, 5))
    family, video = families.video_family(model.config), VideoGrid(5, 2, 3, 0.5, between)
    total = 11 + video.tokens + 6
    whole = family.positions(model, 11, video, 0, total, "published")
    parts = [
        family.positions(model, 11, video, begin, min(begin + chunk, total), "published")
        for begin in range(0, total, chunk)
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    kinds = torch.cat((torch.zeros(11), 2 * video.is_visual(), torch.zeros(6))).long().unsqueeze(0)
    theirs, _ = model.model.get_rope_index(
        input_ids=torch.zeros_like(kinds), mm_token_type_ids=kinds, video_grid_thw=torch.tensor([[5, 4, 6]])
    )
    assert torch.equal(whole, theirs[:, 0])


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5", "qwen3_5_moe", "lfm3_vl"])
def test_written_times_are_those_of_the_file(name, film):
    model, processor = build(name)
    with tieredkv.open_session(model, film, processor=processor, gpu_kv_gb=1, fps=4, start=2.0) as session:
        text = processor.tokenizer.decode(session.video.between[1])
    assert "<2.6 seconds>" in text


def test_uniform_frames_are_kept(film):
    """SmolVLM's own code takes frames whose normalised pixels are all 0 for padding, and drops them."""
    model, processor = build("smolvlm")
    processor = copy.deepcopy(processor)
    processor.video_processor.image_mean, processor.video_processor.image_std = [0.0] * 3, [1.0] * 3
    grey = film.copy()
    grey[3:5] = 0
    with tieredkv.open_session(model, grey, processor=processor, gpu_kv_gb=1, fps=4) as session:
        assert session.video.steps == len(grey)


@pytest.mark.parametrize("kind", ["mllama", "t5", "mamba"])
def test_an_unsupported_family_is_refused_with_its_name(kind):
    from types import SimpleNamespace

    with pytest.raises(UnsupportedModelError, match=f"'{kind}' are not supported for video: `tieredkv models`"):
        families.video_family(SimpleNamespace(model_type=kind))
    with pytest.raises(UnsupportedModelError, match=f"decoders of type '{kind}': `tieredkv models`"):
        families.text_decoder(SimpleNamespace(model_type=kind))
