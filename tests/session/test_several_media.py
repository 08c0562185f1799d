"""Several videos and still pictures in one prompt: what transformers writes, numbers and answers, or a refusal."""

from __future__ import annotations

import copy
import io
import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from families import BUILD, build
from helpers import RecordLogits, assert_near, pressed, session_logits, stock_logits, tier_options
from PIL import Image

import tieredkv
from tieredkv.cache.looks import Looks
from tieredkv.errors import BudgetError, OptionError, SessionError, TieredKVError, UnsupportedModelError, VideoError
from tieredkv.evidence.moments import Shown, collect
from tieredkv.evidence.save import save_evidence
from tieredkv.models.families.base import VideoGrid
from tieredkv.tiny.scene import make_scene
from tieredkv.tiny.video import write_video
from tieredkv.video.media import Picture, Video, media_of

QUESTIONS = ("what is it ?", "and who is that ?")
OPTIONS = {"gpu_kv_gb": 1, "fps": 4, "positions": "stock"}
ALONE = ("minicpmv4_7",)
SAME_LENGTH = ("llava_onevision", "internvl", "perception_lm", "smolvlm")
"""Processors that take several videos only if they have the same number of frames; SmolVLM's writes the longest one's
number for all of them."""
SEVERAL = pytest.mark.parametrize("name", [name for name in BUILD if name not in ALONE])


def noise(seed: int, frames: int, height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def films(name: str) -> list[np.ndarray]:
    if name in SAME_LENGTH:
        return [noise(1, 6), noise(2, 6)]
    return [noise(1, 7), noise(2, 10, 90, 60), noise(3, 2)]


def stock(processor: Any, media: list[Any], question: str, earlier: Any = (), fps: float = 4.0) -> Any:
    """Model inputs made by transformers alone. media: films as arrays, pictures as PIL images."""
    messages: list[dict[str, Any]] = []
    for number, (asked, answer) in enumerate((*earlier, (question, None))):
        kinds = ["video" if isinstance(one, np.ndarray) else "image" for one in media]
        shown = [] if number else [{"type": kind} for kind in kinds]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": asked}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    videos: Any = [torch.from_numpy(one).permute(0, 3, 1, 2) for one in media if isinstance(one, np.ndarray)]
    metadata: Any = [
        {"fps": fps, "total_num_frames": len(one), "frames_indices": list(range(len(one))), "duration": len(one) / fps}
        for one in videos
    ]
    if type(processor).__name__ == "SmolVLMProcessor":  # takes a list of videos for each text
        videos, metadata = [videos], [metadata]
    pictures = [one for one in media if not isinstance(one, np.ndarray)]
    given = {"images": pictures} if pictures else {}
    if videos:
        given |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array", DeprecationWarning)
        return processor(text=[text], return_tensors="pt", **given)


class RecordIds(RecordLogits):
    """Keeps the prompt that a session gives to processors of logits."""

    def __call__(self, input_ids, scores):
        self.ids = getattr(self, "ids", input_ids)
        return super().__call__(input_ids, scores)


def assert_equals_stock(session: Any, model: Any, processor: Any, media: list[Any]) -> None:
    for question in QUESTIONS:
        inputs, record = stock(processor, media, question), RecordIds()
        session.ask(question, max_new_tokens=4, do_sample=False, logits_processor=[record])
        assert record.ids.tolist() == inputs["input_ids"].tolist()
        assert_near(torch.cat(record.seen), stock_logits(model, inputs, 4))


@SEVERAL
@pytest.mark.parametrize("chunks", [{}, {"prefill_chunk": 17, "encode_batch": 10}], ids=["one call", "chunks"])
def test_two_questions_about_several_videos_equal_stock(name, chunks):
    model, processor = build(name)
    shown = films(name)
    media = [Video(film) for film in shown]
    with tieredkv.open_session(model, media, processor=processor, **tier_options(**OPTIONS, **chunks)) as session:
        assert_equals_stock(session, model, processor, shown)


@SEVERAL
def test_a_saved_session_answers_as_before(name, tmp_path):
    model, processor = build(name)
    media = [Video(film) for film in films(name)]
    with tieredkv.open_session(model, media, processor=processor, **OPTIONS) as session:
        session.ask(QUESTIONS[1], max_new_tokens=2)
        expected = session_logits(session, QUESTIONS[0], 3)
        session.save(tmp_path / "films.tkv")
        known = session._ingested
    with tieredkv.load_session(tmp_path / "films.tkv", model, processor=processor, video=media) as session:
        assert session._ingested == known
        assert_near(session_logits(session, QUESTIONS[0], 3), expected)


def test_a_saved_session_refuses_other_media(tmp_path):
    model, processor = build("qwen2_5_vl")
    media = [Video(film) for film in films("qwen2_5_vl")]
    with tieredkv.open_session(model, media, processor=processor, **OPTIONS) as session:
        session.save(tmp_path / "films.tkv")
    for given, message in ((media[:2], "for 3 videos and pictures, not 2"), (media[::-1], "saved for another video")):
        with pytest.raises(SessionError, match=message):
            tieredkv.load_session(tmp_path / "films.tkv", model, processor=processor, video=given)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "lfm3_vl"])
def test_a_conversation_equals_stock(name):
    model, processor = build(name)
    shown = films(name)
    with tieredkv.open_session(model, list(map(Video, shown)), processor=processor, **OPTIONS) as session:
        first = session.chat(QUESTIONS[0], max_new_tokens=3).text
        inputs = stock(processor, shown, QUESTIONS[1], earlier=[(QUESTIONS[0], first)])
        expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert session.chat(QUESTIONS[1], max_new_tokens=3).token_ids == expected.tolist()


def test_text_after_each_video_continues_its_positions():
    """By default as the authors of Qwen2.5-VL number it: from the largest position before it."""
    model, processor = build("qwen2_5_vl")
    first, second = noise(1, 40), noise(2, 6)
    options = {**OPTIONS, "positions": "published"}
    with tieredkv.open_session(model, [Video(first), Video(second)], processor=processor, **options) as session:
        one, two = session._ingested.media
        family = session.family
        before = one.positions(family, model, 0, one.tokens, "published")
        assert two.shift == int(before.max()) + 1
        assert int(two.positions(family, model, 0, 1, "published").max()) == two.shift
        # The temporal extent of the first exceeds its sides, so transformers' own rule differs.
        assert two.shift > int(one.positions(family, model, one.tokens, one.tokens + 1, "stock")[0, 0])


def test_a_small_cap_holds():
    model, processor = build("qwen3_vl")
    media = [Video(noise(number, 60)) for number in range(3)]
    options = {"processor": processor, "fps": 4, "chunk_tokens": 8, "prefill_chunk": 64, "text_window": 8}
    with tieredkv.open_session(model, media, gpu_kv_gb=1, **tier_options(**options)) as session:
        tokens = session._ingested.tokens
    with tieredkv.open_session(model, media, **pressed(model, tokens, 0.5), **tier_options(**options)) as session:
        stats = session.ask(QUESTIONS[0], max_new_tokens=6).stats
        assert session.ingest_stats.frames == 180
    assert stats.kv_device_peak_bytes <= stats.kv_cap_bytes < stats.kv_full_bytes
    assert stats.visual_tokens == sum(grid.visual_tokens for grid in session.videos)


def test_each_video_may_be_sampled_in_its_own_way():
    model, processor = build("qwen3_vl")
    media = [Video(noise(1, 40), start=2.0, source_fps=4), Video(noise(2, 40), fps=2, source_fps=4)]
    with tieredkv.open_session(model, media, processor=processor, gpu_kv_gb=1, fps=4) as session:
        assert [grid.steps for grid in session.videos] == [16, 10]
        assert "<2.1 seconds>" in processor.tokenizer.decode(session._ingested.head_ids)
        with pytest.raises(TieredKVError, match="has 2 videos and pictures: `videos` lists them"):
            _ = session.video


def test_the_sampling_of_one_video_is_that_of_the_session():
    model, processor = build("qwen3_vl")
    video = Video(noise(1, 40), fps=2, source_fps=4)
    with tieredkv.open_session(model, video, processor=processor, gpu_kv_gb=1, fps=4) as session:
        assert (session.sampling.fps, session.video.steps) == (2, 10)


@pytest.mark.parametrize("name", ALONE)
def test_a_family_that_takes_one_video_refuses_more(name):
    model, processor = build(name)
    with pytest.raises(UnsupportedModelError, match=f"'{name}' take one video in a prompt here, not 2 media"):
        tieredkv.open_session(model, list(map(Video, films(name)[:2])), processor=processor, **OPTIONS)


def test_a_template_that_writes_the_first_video_only_is_refused():
    model, processor = build("qwen2_5_vl")
    processor = copy.deepcopy(processor)
    processor.chat_template = "<|vision_start|><|video_pad|><|vision_end|>{{ messages[-1]['content'][-1]['text'] }}"
    with pytest.raises(UnsupportedModelError, match="no placeholder for each of 2 media, in their order"):
        tieredkv.open_session(model, list(map(Video, films("qwen2_5_vl")[:2])), processor=processor, **OPTIONS)


# ---- still pictures

QWEN = pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe"])


def still(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(noise(seed, 1, height, width)[0])


MIXED = {
    "picture first": lambda: [still(9, 70, 130), noise(1, 7), still(8, 160, 90), noise(2, 6, 90, 60)],
    "picture last": lambda: [noise(1, 7), noise(2, 6, 90, 60), still(9, 70, 130)],
    "pictures alone": lambda: [still(9, 70, 130), still(8, 160, 90)],
}


@QWEN
@pytest.mark.parametrize("mix", MIXED)
@pytest.mark.parametrize("chunks", [{}, {"prefill_chunk": 17, "encode_batch": 10}], ids=["one call", "chunks"])
def test_pictures_among_videos_equal_stock(name, mix, chunks):
    model, processor = build(name)
    shown = MIXED[mix]()
    media = [Video(one) if isinstance(one, np.ndarray) else Picture(one) for one in shown]
    with tieredkv.open_session(model, media, processor=processor, **tier_options(**OPTIONS, **chunks)) as session:
        assert_equals_stock(session, model, processor, shown)


@QWEN
def test_a_session_with_pictures_is_saved(name, tmp_path):
    """Pictures from files, one of them turned by its EXIF data, and the last of them before the question."""
    model, processor = build(name)
    exif = Image.Exif()
    exif[0x0112] = 6
    still(1, 60, 130).save(tmp_path / "map.png")
    still(2, 90, 60).save(tmp_path / "turned.png", exif=exif)
    media = [tmp_path / "map.png", Video(noise(1, 6)), str(tmp_path / "turned.png")]
    with tieredkv.open_session(model, media, processor=processor, **OPTIONS) as session:
        session.ask(QUESTIONS[1], max_new_tokens=2)
        expected = session_logits(session, QUESTIONS[0], 3)
        assert session.videos[2].columns > session.videos[2].rows
        assert tuple(each.facts.name for each in session.media) == (
            str(tmp_path / "map.png"),
            "the frames given",
            str(tmp_path / "turned.png"),
        )
        session.save(tmp_path / "films.tkv")
    with tieredkv.load_session(tmp_path / "films.tkv", model, processor=processor, video=media) as session:
        assert_near(session_logits(session, QUESTIONS[0], 3), expected)
        answer = session.ask(QUESTIONS[0], max_new_tokens=2)
        save_evidence(answer, tmp_path / "where.png", video=media, medium=0)
    assert {(moment.start, moment.end) for moment in answer.evidence.parts[0]} <= {(0.0, 0.0)}
    still(3, 60, 130).save(tmp_path / "map.png")
    with pytest.raises(SessionError, match="saved for another video"):
        tieredkv.load_session(tmp_path / "films.tkv", model, processor=processor, video=media)


def test_max_pixels_limits_pictures_too():
    model, processor = build("qwen2_5_vl")
    shown = [still(9, 280, 280), noise(1, 4)]
    media = [Picture(shown[0]), Video(shown[1])]
    with tieredkv.open_session(model, media, processor=processor, max_pixels=28 * 28 * 4, **OPTIONS) as session:
        assert [(grid.rows, grid.columns) for grid in session.videos] == [(2, 2), (1, 2)]
    with tieredkv.open_session(model, media, processor=processor, **OPTIONS) as session:
        assert (session.videos[0].rows, session.videos[0].columns) == (10, 10)


@pytest.mark.parametrize("name", ["internvl", "gemma4", "lfm3_vl", "video_llama_3", "glm4v"])
def test_a_family_without_pictures_refuses_them_by_name(name):
    model, processor = build(name)
    with pytest.raises(UnsupportedModelError, match=f"still pictures are not supported for models of type '{name}'"):
        tieredkv.open_session(model, [Video(noise(1, 4)), Picture(still(1, 60, 90))], processor=processor, **OPTIONS)


def test_a_list_of_images_is_still_one_video():
    frames = [still(seed, 60, 90) for seed in range(4)]
    assert [type(one) for one in media_of(frames)] == [Video]
    assert [type(one) for one in media_of(["a.mp4", frames[0], "map.PNG", frames])] == [Video, Picture, Picture, Video]


BAD = {
    "a missing picture": (["gone.png"], r"gone.png: no such file."),
    "no picture": ([__file__ + ".png"], "no such file"),
    "a number": ([Picture(3)], "a picture is of type int: give a path or a PIL image"),
    "a missing film": (["gone.mp4", "too.mp4"], r"gone.mp4: no such file."),
}


@pytest.mark.parametrize(("media", "message"), BAD.values(), ids=BAD)
def test_media_that_cannot_be_read_are_refused_before_a_model_is_loaded(media, message):
    with pytest.raises(VideoError, match=message):
        tieredkv.generate("/nowhere", media, "what ?")


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    (tmp_path / "map.png").write_text("no picture")
    model, processor = build("qwen2_vl")
    with pytest.raises(VideoError, match=r"map\.png: not a readable picture"):
        tieredkv.open_session(model, [tmp_path / "map.png"], processor=processor, **OPTIONS)


def test_options_of_a_video_are_checked():
    with pytest.raises(OptionError, match="'speed' is not an option of a video: give one of end, fps, max_frames"):
        Video("a.mp4", speed=2)
    with pytest.raises(VideoError, match="start=-1 is not valid"):
        Video("a.mp4", start=-1)


# ---- evidence


def test_evidence_says_which_video():
    """Attention to a token of the second video is a moment of the second video, at its own time."""
    grids = [VideoGrid(4, 1, 2, 1.0), VideoGrid(5, 1, 2, 2.0)]
    shown = [Shown(3, grids[0], (0.0, 4.0), "a.mp4"), Shown(13, grids[1], (10.0, 20.0), "b.mp4")]
    looks = Looks(1)
    question = torch.zeros(2, 25)
    question[0, 5], question[1, 17] = 1.0, 3.0  # step 1 of the first, step 2 of the second
    looks.question = question
    evidence = collect(looks, 2, 1, shown, 1, False)
    assert [(moment.medium, moment.start, moment.end, moment.weight) for moment in evidence] == [
        (1, 14.0, 16.0, 0.75),
        (0, 1.0, 2.0, 0.25),
    ]
    assert [part.source for part in evidence.parts] == ["a.mp4", "b.mp4"]
    assert [len(part.heat) for part in evidence.parts] == [4, 5]
    assert torch.cat([part.heat for part in evidence.parts]).tolist() == evidence.heat.tolist()
    assert [part.moments for part in evidence.parts] == [evidence.moments[1:], evidence.moments[:1]]


def test_an_answer_names_the_media_of_its_moments():
    model, processor = build("qwen2_5_vl")
    with tieredkv.open_session(model, list(map(Video, films("qwen2_5_vl"))), processor=processor, **OPTIONS) as session:
        answer = session.ask(QUESTIONS[0], max_new_tokens=3, evidence="tokens")
    plain = answer.as_dict()
    assert plain["media"] == ["the frames given"] * 3
    assert {moment["medium"] for moment in plain["evidence"]} <= {0, 1, 2}
    assert len(answer.evidence.tokens) == 3
    assert float(answer.evidence.heat.sum()) == pytest.approx(1)


def test_the_evidence_of_one_medium_is_drawn(tmp_path):
    model, processor = build("qwen2_5_vl")
    media = list(map(Video, films("qwen2_5_vl")))
    with tieredkv.open_session(model, media, processor=processor, **OPTIONS) as session:
        answer = session.ask(QUESTIONS[0], max_new_tokens=3)
    for suffix in (".png", ".html"):
        with pytest.raises(
            OptionError, match="about 3 videos and pictures, of which one is drawn: give medium=, 0 to 2"
        ):
            save_evidence(answer, tmp_path / f"where{suffix}", video=media, source_fps=4)
        save_evidence(answer, tmp_path / f"where{suffix}", video=media, source_fps=4, medium=1)
        assert (tmp_path / f"where{suffix}").stat().st_size > 1000
    with pytest.raises(OptionError, match="medium=3 is not valid"):
        save_evidence(answer, tmp_path / "where.png", medium=3)


# ---- plans


@SEVERAL
def test_a_plan_counts_the_tokens_of_the_session(name):
    model, processor = build(name)
    media = list(map(Video, films(name)))
    options = {"processor": processor, "gpu_kv_gb": 1, "fps": 4, "system": "Be brief."}
    plan = tieredkv.plan(model, media, question_tokens=9, **options)
    with tieredkv.open_session(model, media, **options) as session:
        assert plan.prompt_tokens == session._ingested.tokens + 9
        assert plan.visual_tokens == sum(grid.visual_tokens for grid in session.videos)


def test_a_plan_counts_pictures():
    model, processor = build("qwen3_vl")
    media = [Picture(still(9, 70, 130)), Video(noise(1, 7)), Picture(still(8, 160, 90))]
    options = {"processor": processor, "gpu_kv_gb": 1, "fps": 4}
    plan = tieredkv.plan(model, media, question_tokens=9, **options)
    with tieredkv.open_session(model, media, **options) as session:
        assert plan.prompt_tokens == session._ingested.tokens + 9
    assert "the picture given, the frames given, the picture given" in str(plan)
    alone = tieredkv.plan(model, media[0], question_tokens=9, **options)
    with tieredkv.open_session(model, media[0], **options) as session:
        assert alone.prompt_tokens == session._ingested.tokens + 9


def test_several_that_do_not_fit_are_refused_before_they_are_decoded(monkeypatch):
    model, processor = build("qwen2_5_vl")
    media = [Video(noise(number, 200)) for number in range(2)]
    monkeypatch.setattr("tieredkv.session.ingest.Stages", None)
    options = {"processor": processor, "fps": 4, "chunk_tokens": 8}
    whole = pressed(model, 700, 1)["gpu_kv_gb"]
    for call in (tieredkv.plan, tieredkv.open_session):
        with pytest.raises(BudgetError, match="lower fps, max_pixels, max_frames or max_new_tokens"):
            call(model, media, gpu_kv_gb=whole / 100, **options)
        with pytest.raises(OptionError, match="fit=True is for one video: give fps and max_pixels for several"):
            call(model, media, gpu_kv_gb=1, fit=True, **options)
        with pytest.raises(OptionError, match="fit=True is for one video"):
            call(model, Picture(still(1, 60, 90)), gpu_kv_gb=1, fit=True, **options)


# ---- the command line


@pytest.fixture(scope="module")
def films_of_the_toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    return [str(write_video(make_scene(seed, 10, 2), folder / f"{name}.mp4")) for name, seed in (("a", 4), ("b", 5))]


@pytest.mark.model
def test_ask_takes_several_files_and_saves_their_session(monkeypatch, capsys, films_of_the_toy, tmp_path):
    still(1, 56, 56).save(tmp_path / "map.png")
    files, question = [*films_of_the_toy, str(tmp_path / "map.png")], "what colour was the star ?"
    options = ["-m", "tiny", "--session", str(tmp_path / "films.tkv"), "--max-new-tokens", "2"]
    drawn = ["--evidence", str(tmp_path / "where.html")]
    code, out, err = run(monkeypatch, capsys, "ask", *files, question, *options, *drawn, "--json")
    assert code == 0, err
    assert json.loads(out)["media"] == files
    assert {moment["medium"] for moment in json.loads(out)["evidence"]} <= {0, 1, 2}
    names = [f"where-{number}.html" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.glob("*.html")) == names
    assert "where-1.html, " in err
    again = run(monkeypatch, capsys, "ask", question, *options, "--json")
    assert (again[0], json.loads(again[1])["token_ids"]) == (0, json.loads(out)["token_ids"])
    code, _, err = run(monkeypatch, capsys, "ask", *files[::-1], question, *options)
    assert code == 2
    assert "was saved for another video" in err


@pytest.mark.model
def test_chat_takes_several_files(monkeypatch, capsys, films_of_the_toy):
    monkeypatch.setattr("sys.stdin", io.StringIO("what colour was the star ?\n"))
    code, out, _ = run(monkeypatch, capsys, "chat", *films_of_the_toy, "-m", "tiny", "--max-new-tokens", "2")
    assert code == 0
    assert out.strip()


@pytest.mark.model
def test_plan_takes_several_files(monkeypatch, capsys, films_of_the_toy):
    code, out, _ = run(monkeypatch, capsys, "plan", *films_of_the_toy, "-m", "tiny", "--json")
    one = json.loads(run(monkeypatch, capsys, "plan", films_of_the_toy[0], "-m", "tiny", "--json")[1])
    assert code == 0
    assert json.loads(out)["visual_tokens"] == 2 * one["visual_tokens"]
    assert json.loads(out)["video"] == ", ".join(films_of_the_toy)


WORDS = {
    "an unquoted question": (["a.mp4", "what", "is", "it", "?"], "in quotes: a.mp4: no such file"),
    "no question": ([__file__, __file__], "and the question is missing"),
}


@pytest.mark.parametrize(("words", "message"), WORDS.values(), ids=WORDS)
def test_words_that_ask_does_not_take(monkeypatch, capsys, words, message):
    code, _, err = run(monkeypatch, capsys, "ask", *words)
    assert code == 2
    assert message in err
