"""`fit=True`: what is lowered first, and how far; and refusals whose every change is accepted."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from families import BUILD, build

import tieredkv
from tieredkv.errors import BudgetError
from tieredkv.memory import limits
from tieredkv.memory.units import GIB
from tieredkv.models import families
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.planning import forecast, planned
from tieredkv.planning.fitting import GOOD_PIXELS, GOOD_RATE, LEAST_RATE, SMALL_PIXELS, Choice, Film, fitted
from tieredkv.video.frames import Sampled
from tieredkv.video.media import media_of
from tieredkv.video.sampling import Sampling

HOUR = 3600.0
FIXED = ("llava_onevision", "internvl", "smolvlm", "perception_lm")


def film(name: str = "qwen2_5_vl", sampling: Sampling | None = None, height: int = 1080, width: int = 1920) -> Film:
    """An hour at two frames a second, of frames as large as they are recorded."""
    model, processor = build(name)
    sampling = sampling or Sampling(fps=2.0, max_pixels=None if name in FIXED else height * width)
    fps, frames = sampling.spread(math.ceil(HOUR * sampling.fps), HOUR)
    sampled = Sampled(frames, height, width, fps, 0.0, HOUR, sampling.max_pixels)
    template = ChatTemplate(families.video_family(model.config), processor)
    return Film(template, model.config, sampling, sampled, lambda sampled, grid: 20)


def test_a_film_that_fits_is_left_alone():
    one = film()
    assert fitted(one, one.tokens(one.asked)) == one.asked


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_what_is_lowered_first_and_how_far(name):
    one, stages = film(name), []
    whole = one.tokens(one.asked)
    for share in (1, 0.7, 0.55, 0.3, 0.1, 0.05, 0.03, 0.01, 0.003, 0.001, 0.0004):
        choice = fitted(one, int(whole * share))
        if choice is None:
            break
        assert one.tokens(choice) <= whole * share
        stages.append((choice.fps, one.pixels(choice)))
    assert [rate for rate, _ in stages] == sorted((rate for rate, _ in stages), reverse=True)
    assert [size for _, size in stages] == sorted((size for _, size in stages), reverse=True)
    full = stages[0][1]
    for rate, size in stages:
        assert rate >= LEAST_RATE
        assert size == full or rate <= GOOD_RATE
        assert rate >= GOOD_RATE or size <= max(GOOD_PIXELS, one.pixels(one.smallest(one.asked, GOOD_PIXELS)))
        assert size >= 0.9 * GOOD_PIXELS or rate == LEAST_RATE


def test_a_choice_is_the_highest_that_fits():
    one = film()
    most = one.tokens(Choice(1.3, one.asked.max_pixels))
    assert fitted(one, most) == Choice(1.3, one.asked.max_pixels)
    assert fitted(one, most - 1) == Choice(1.2, one.asked.max_pixels)
    size = fitted(one, one.tokens(Choice(1.0, 640 * 360)))
    assert one.size(size) == one.size(Choice(1.0, 640 * 360))


def test_no_frame_is_made_smaller_than_the_rule_says():
    one = film()
    lowest = Choice(LEAST_RATE, SMALL_PIXELS)
    assert fitted(one, one.tokens(lowest)) == lowest
    assert fitted(one, one.tokens(lowest) - 1) is None


def test_what_was_given_is_kept():
    one = film()
    most = one.tokens(one.asked) // 15
    assert fitted(one, most, rate=False).fps == 2.0
    assert fitted(one, most, size=False).max_pixels == one.asked.max_pixels
    assert fitted(one, most, rate=False, size=False) is None


@pytest.mark.parametrize("name", FIXED)
def test_families_with_one_frame_size_only_lower_the_rate(name):
    one = film(name)
    choice = fitted(one, one.tokens(one.asked) // 9)
    assert choice.max_pixels is None
    assert 0.2 <= choice.fps <= 0.25


def test_small_frames_are_not_enlarged():
    one = film(sampling=Sampling(fps=2.0), height=144, width=176)
    before = one.size(one.asked)
    choice = fitted(one, one.tokens(one.asked) // 5)
    assert one.size(choice) == before
    assert choice.max_pixels is None


def test_max_frames_stays_an_upper_bound():
    one = film(sampling=Sampling(fps=2.0, max_frames=900, max_pixels=448 * 252))
    assert one.at(one.asked).fps == 0.25
    choice = fitted(one, one.tokens(one.asked) - 1)
    assert 0.2 < choice.fps < 0.25


@pytest.mark.parametrize("name", BUILD)
def test_tokens_are_those_of_the_plan(name):
    model, processor = build(name)
    one = film(name, height=180, width=320)
    video = np.zeros((60, 180, 320, 3), np.uint8)
    limit = None if name in FIXED else 28 * 28 * 40
    for rate in (2.0, 0.7):
        sampling = Sampling(fps=rate, max_pixels=limit, source_fps=1)
        plan = tieredkv.plan(
            model, video, processor=processor, gpu_kv_gb=1, question_tokens=20, source_fps=1, fps=rate, max_pixels=limit
        )
        sampled = Sampled(math.ceil(60 * 2.0), 180, 320, 2.0, 0.0, 60.0, limit)
        one = Film(one.template, one.config, Sampling(fps=2.0, max_pixels=limit), sampled, lambda sampled, grid: 0)
        text = plan.prompt_tokens - plan.visual_tokens - plan.video_text_tokens
        assert one.tokens(Choice(rate, sampling.max_pixels)) == plan.prompt_tokens - text


# ---- refusals


@pytest.fixture
def hour(monkeypatch, tmp_path) -> dict[str, Any]:
    """A plan's arguments for an hour of 1080p, on a machine of 40 GiB."""

    def open_video(video: Any, sampling: Sampling) -> Any:
        fps, frames = sampling.spread(math.ceil(HOUR * sampling.fps), HOUR)
        return SimpleNamespace(
            name=video, height=1080, width=1920, fps=fps, expected=frames, start=0.0, seconds=HOUR, cues=()
        )

    monkeypatch.setattr(planned, "open_video", open_video)
    monkeypatch.setattr(forecast, "check_media", lambda video, allow_url: media_of(video))
    monkeypatch.setattr(limits, "available_host_bytes", lambda: 40 * GIB)
    from transformers import Qwen2VLVideoProcessor

    _, processor = build("qwen2_5_vl")
    processor = type(processor)(
        processor.image_processor,
        processor.tokenizer,
        Qwen2VLVideoProcessor(cap_pixels_per_frame=False),  # as published: up to 602,112 pixels of a frame
        chat_template=processor.chat_template,
    )
    return {"model": _three_billion(), "video_or_tokens": str(tmp_path / "film.mp4"), "processor": processor}


def _three_billion() -> Any:
    """Qwen2.5-VL-3B's, as far as sizes depend on it."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "vocab_size": 151_936,
            "max_position_embeddings": 128_000,
            "tie_word_embeddings": True,
        },
        vision_config={"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16,
                       "out_hidden_size": 2048},
        tie_word_embeddings=True,
    )  # fmt: skip


def named(message: str) -> list[dict[str, float]]:
    """The changes that a refusal names, as options."""
    changes = re.split(r", | or ", re.split(r"[Gg]ive ", message, maxsplit=1)[1])
    return [
        {key: float(value.rstrip(".")) for key, value in re.findall(r"(\w+)=([\d.]+)", change)} for change in changes
    ]


WHOLE = ("max_pixels", "host_kv_bits")


@pytest.mark.parametrize(
    "budgets",
    [
        {"gpu_kv_gb": 4},
        {"gpu_kv_gb": 2, "fps": 1.0},
        {"gpu_kv_gb": 1, "max_frames": 3000},
        {"gpu_kv_gb": 8},
        {"gpu_kv_gb": 8, "host_kv_gb": 6.5},
        {"gpu_kv_gb": 2, "max_pixels": 1280 * 720, "host_kv_gb": 30},
    ],
    ids=str,
)
def test_every_change_that_a_refusal_names_is_accepted(hour, budgets):
    with pytest.raises(BudgetError) as refused:
        tieredkv.plan(**hour, **budgets)
    changes = named(str(refused.value))
    assert {"fps"} in [set(change) for change in changes]
    assert any("max_pixels" in change for change in changes)
    for change in changes:
        whole = {key: int(value) if key in WHOLE else value for key, value in change.items()}
        tieredkv.plan(**hour, **{**budgets, **whole})


def test_a_refusal_is_useful_for_an_hour_on_a_card_of_12_gb(hour):
    with pytest.raises(BudgetError) as refused:
        tieredkv.plan(**hour, gpu_kv_gb=2)
    first, *_ = named(str(refused.value))
    assert first == {"fps": 1, "max_pixels": pytest.approx(350_000, rel=0.1)}  # rather than a rate of 0.6
    assert "Raise it" not in str(refused.value)  # the host has no room for that either


def test_a_cap_is_named_where_the_host_has_room(hour, monkeypatch):
    monkeypatch.setattr(limits, "available_host_bytes", lambda: 1000 * GIB)
    with pytest.raises(BudgetError, match=r"the smallest that works is 6\.47\. Raise it, or give fps=") as refused:
        tieredkv.plan(**hour, gpu_kv_gb=2)
    assert tieredkv.plan(**hour, gpu_kv_gb=6.47).fps == 2
    assert "fps=0.61" in str(refused.value)


def test_a_plan_with_fit_says_what_it_chose(hour):
    plan = tieredkv.plan(**hour, gpu_kv_gb=2, fit=True)
    assert plan.fit.startswith(f"fit: {plan.fps:g} frame")
    assert f"{plan.prompt_tokens:,} tokens" in plan.fit
    height, width = plan.tower_size
    assert f"at {width}x{height}" in plan.fit
    options = {key: float(value) for key, value in re.findall(r"(\w+)=([\d.]+)", plan.fit)}
    options["max_pixels"] = int(options["max_pixels"])
    assert tieredkv.plan(**hour, gpu_kv_gb=2, **options).prompt_tokens == plan.prompt_tokens


def test_a_plan_with_fit_names_the_bits_in_which_all_of_it_fits(hour, monkeypatch):
    monkeypatch.setattr(limits, "available_host_bytes", lambda: 40 * GIB)
    lowered = tieredkv.plan(**hour, gpu_kv_gb=20, fit=True, host_kv_bits=16)
    assert lowered.fps < 2
    option = re.search(r", which fits with host_kv_bits=(\d+)\.$", lowered.fit)
    assert tieredkv.plan(**hour, gpu_kv_gb=20, fit=True, host_kv_bits=int(option[1])).fit.endswith("as asked for.")


def test_a_plan_that_fits_is_left_alone(hour):
    options = {"gpu_kv_gb": 1.4, "max_pixels": 448 * 252}
    alone = tieredkv.plan(**hour, **options)  # though longer than the model is made for, under a cap with little room
    left = tieredkv.plan(**hour, **options, fit=True)
    assert left.prompt_tokens == alone.prompt_tokens > 128_000
    assert left.fit.endswith("as asked for.")
    tight = tieredkv.plan(**hour, gpu_kv_gb=1.2, max_pixels=448 * 252, fit=True)
    assert tight.prompt_tokens < 128_000


def test_fit_is_one_refusal_where_nothing_fits(hour):
    with pytest.raises(BudgetError, match=r"fit=True goes down to 0\.1 frames .* at 280x140, .* need gpu_") as none:
        tieredkv.plan(**hour, gpu_kv_gb=0.01, fit=True)
    cap = float(re.search(r"gpu_kv_gb=([\d.]+\d)", str(none.value))[1])
    assert tieredkv.plan(**hour, gpu_kv_gb=cap, fit=True).fps == LEAST_RATE


# ---- sessions


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    small = np.random.default_rng(3).integers(0, 256, (48, 9, 16, 3), dtype=np.uint8)
    return small.repeat(20, axis=1).repeat(20, axis=2)


def test_a_session_with_fit_says_what_it_chose_and_keeps_it(frames, capsys):
    model, processor = build("qwen2_5_vl")
    options = {"processor": _wide(processor), "source_fps": 2, "gpu_kv_gb": 0.00013}
    with pytest.raises(BudgetError, match=r"Raise it, or give .*fps="):
        tieredkv.open_session(model, frames, **options)
    with tieredkv.open_session(model, frames, progress=True, fit=True, **options) as session:
        chosen, tokens = session.sampling, session.video.visual_tokens
    assert not chosen.fit
    plan = tieredkv.plan(
        model, frames, fps=chosen.fps, max_pixels=chosen.max_pixels, question_tokens=9, max_new_tokens=1, **options
    )
    assert plan.visual_tokens == tokens
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("tieredkv: fit: ")
    assert f"(fps={chosen.fps:g}" in line


def _wide(processor: Any) -> Any:
    """A processor that leaves frames as large as they are."""
    import copy

    from transformers import Qwen2VLVideoProcessor

    processor = copy.copy(processor)
    size = {"shortest_edge": 784, "longest_edge": 320 * 180}
    processor.video_processor = Qwen2VLVideoProcessor(size=size, do_sample_frames=False, cap_pixels_per_frame=False)
    return processor


def test_a_session_refuses_with_the_words_of_the_plan(frames):
    model, processor = build("qwen2_5_vl")
    options = {"processor": _wide(processor), "source_fps": 2, "fps": 2, "gpu_kv_gb": 0.00013}
    with pytest.raises(BudgetError) as refused:
        tieredkv.open_session(model, frames, **options)
    for change in named(str(refused.value)):
        whole = {key: int(value) if key in WHOLE else value for key, value in change.items()}
        tieredkv.open_session(model, frames, **{**options, **whole}).close()
