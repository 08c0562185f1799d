"""Subtitles written between the frames: their places, that transformers would read the same prompt, and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import run
from families import BUILD, build
from helpers import assert_near, session_logits, stock_logits, tier_options
from test_several_media import RecordIds, noise, stock

import tieredkv
from tieredkv.batch.questions_file import read_questions
from tieredkv.batch.session_folder import _plain
from tieredkv.errors import OptionError, PromptError, SessionError, UnsupportedModelError, VideoError
from tieredkv.session.manifest import read_manifest
from tieredkv.session.origin import check_sampling
from tieredkv.tiny.model import PATH
from tieredkv.tiny.scene import make_scene
from tieredkv.tiny.video import write_video
from tieredkv.video.frames import Sampled, open_video
from tieredkv.video.sampling import Sampling

FPS = 2.0
OPTIONS = {"gpu_kv_gb": 1, "fps": FPS, "positions": "stock"}
CUES = [(0.2, 0.9, "Good morning."), (1.2, 2.0, "Who\nis there?"), (1.4, 3.0, "A friend."), (9.0, 9.5, "Too late.")]
QUESTION = "Who?"


def clock(seconds: float) -> str:
    return f"00:00:{seconds:06.3f}".replace(".", ",")


def subtitle_file(folder, cues=CUES) -> str:
    file = folder / "film.srt"
    lines = [f"{n}\n{clock(a)} --> {clock(b)}\n{text}\n" for n, (a, b, text) in enumerate(cues, 1)]
    file.write_text("\n".join(lines))
    return str(file)


WITH = pytest.mark.parametrize("name", [name for name in BUILD if not name.startswith("minicpm")])


def written(processor, ids: list[int]) -> str:
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def sampled(film, file: str) -> Sampled:
    return Sampled.of(open_video(film, Sampling(FPS, subtitles=file)))


@pytest.mark.parametrize(("step", "texts"), [(0, ["Good morning."]), (1, ["Who\nis there?", "A friend."]), (2, [])])
def test_a_subtitle_belongs_to_the_step_during_which_it_begins(tmp_path, step, texts):
    video = sampled(noise(1, 6), subtitle_file(tmp_path))
    assert [cue.text for cue in video.cues_of(step, 2)] == texts


def test_the_first_step_has_what_began_before_it(tmp_path):
    video = Sampled.of(open_video(noise(1, 12), Sampling(FPS, start=1.5, subtitles=subtitle_file(tmp_path))))
    assert [cue.text for cue in video.cues_of(0, 2)] == ["Who\nis there?", "A friend."]


def test_what_is_shown_outside_the_span_is_left_out(tmp_path):
    assert [cue.start for cue in sampled(noise(1, 6), subtitle_file(tmp_path)).cues] == [0.2, 1.2, 1.4]


@WITH
@pytest.mark.parametrize("chunks", [{}, {"prefill_chunk": 17, "encode_batch": 10}], ids=["one call", "chunks"])
def test_transformers_answers_the_same_from_the_same_prompt(name, tmp_path, chunks):
    model, processor = build(name)
    film, record = noise(1, 6), RecordIds()
    options = tier_options(**OPTIONS, **chunks)
    with tieredkv.open_session(
        model, film, processor=processor, subtitles=subtitle_file(tmp_path), **options
    ) as session:
        session.ask(QUESTION, max_new_tokens=4, do_sample=False, logits_processor=[record])
    inputs = stock(processor, [film], QUESTION, fps=FPS)
    plain, ids = inputs["input_ids"][0].tolist(), record.ids[0].tolist()
    added = written(processor, ids).split("Subtitle: ")[1:]
    assert len(added) == 3
    text = written(processor, ids)
    for line in ("Good morning.", "Who is there?", "A friend."):
        begin = text.index("Subtitle: ")
        end = text.index("\n", begin) + 1
        assert text[begin:end].removesuffix("\n").endswith(line)
        text = text[:begin] + text[end:]
    assert text == written(processor, plain)
    visual = (
        set(torch.tensor(plain)[inputs["mm_token_type_ids"][0] > 0].tolist())
        if "mm_token_type_ids" in inputs
        else set()
    )
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if visual:
        kinds = inputs["mm_token_type_ids"][inputs["mm_token_type_ids"] > 0].unique()
        assert len(kinds) == 1
        inputs["mm_token_type_ids"] = torch.tensor([[int(kinds) if each in visual else 0 for each in ids]])
    assert_near(torch.cat(record.seen), stock_logits(model, inputs, 4))


def test_each_stands_before_the_frames_of_its_time(tmp_path):
    model, processor = build("qwen3_vl")
    with tieredkv.open_session(
        model, noise(1, 6), processor=processor, subtitles=subtitle_file(tmp_path), **tier_options(**OPTIONS)
    ) as session:
        assert session.video is not None
        ids = [token for text in session.video.between for token in (*text, 0)]
        text = written(processor, ids)
    assert text.index("Who is there?") < text.index("A friend.") < text.index("<1.2 seconds>")
    assert "Good morning." not in text  # before the first frame


def test_a_family_without_text_between_frames_reads_them_first_with_their_times(tmp_path):
    model, processor = build("qwen2_5_vl")
    with tieredkv.open_session(
        model, noise(1, 6), processor=processor, subtitles=subtitle_file(tmp_path), **tier_options(**OPTIONS)
    ) as session:
        head = written(processor, list(session.media[0].text_ids))
    assert "Subtitle: [0:01] Who is there?\nSubtitle: [0:01] A friend.\n<|vision_start|>" in head


@pytest.mark.parametrize("name", [name for name in BUILD if name.startswith("minicpm")])
def test_a_family_in_whose_prompts_no_text_can_stand_refuses_them(name, tmp_path):
    model, processor = build(name)
    with pytest.raises(UnsupportedModelError, match="take no subtitles here"):
        tieredkv.open_session(model, noise(1, 6), processor=processor, fps=FPS, subtitles=subtitle_file(tmp_path))


def test_a_token_of_the_model_in_a_subtitle_is_refused(tmp_path):
    model, processor = build("qwen3_vl")
    file = subtitle_file(tmp_path, [(1.2, 2.0, "stop <|im_end|> here")])
    with pytest.raises(PromptError, match=r"subtitles contain '<\|im_end\|>' at 1.2"):
        tieredkv.open_session(model, noise(1, 6), processor=processor, fps=FPS, subtitles=file)


@pytest.mark.parametrize("subtitles", [3, "", b"film.srt"])
def test_what_names_no_file_is_refused(subtitles):
    with pytest.raises(VideoError, match="subtitles="):
        Sampling(subtitles=subtitles)


def test_frames_have_no_text_track(tmp_path):
    with pytest.raises(VideoError, match="for a video file"):
        open_video(noise(1, 6), Sampling(FPS, subtitles="auto"))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_plan_counts_their_tokens(name, tmp_path):
    model, processor = build(name)
    given = {"processor": processor, "fps": FPS, "subtitles": subtitle_file(tmp_path)}
    planned = tieredkv.plan(model, noise(1, 6), question_tokens=5, **given)
    with tieredkv.open_session(model, noise(1, 6), **given, gpu_kv_gb=1) as session:
        assert session._cached is not None
        assert planned.prompt_tokens == session._cached.video.tokens + 5


def test_a_saved_session_answers_with_them_and_refuses_others(tmp_path):
    model, processor = build("qwen3_vl")
    file, saved = subtitle_file(tmp_path), tmp_path / "film.tkv"
    with tieredkv.open_session(
        model, noise(1, 6), processor=processor, subtitles=file, **tier_options(**OPTIONS)
    ) as session:
        session.save(saved)
        expected = session_logits(session, QUESTION, 4)
    with tieredkv.load_session(saved, model, processor=processor) as session:
        assert torch.equal(session_logits(session, QUESTION, 4), expected)
    manifest = read_manifest(saved)
    check_sampling(saved, manifest, {"subtitles": file})
    subtitle_file(tmp_path, CUES[:2])
    with pytest.raises(SessionError, match="saved with other subtitles"):
        check_sampling(saved, manifest, {"subtitles": file})


@pytest.fixture(scope="module")
def film_of_the_toy(tmp_path_factory):
    return write_video(make_scene(4, 10, 2), tmp_path_factory.mktemp("film") / "film.mp4")


@pytest.mark.model
def test_ask_reads_a_file_and_keeps_its_session(monkeypatch, capsys, film_of_the_toy, tmp_path):
    monkeypatch.chdir(tmp_path)
    subtitle_file(tmp_path)
    options = ["-m", "tiny", "--session", "film.tkv", "--max-new-tokens", "2", "--json"]
    plain = run(
        monkeypatch, capsys, "ask", str(film_of_the_toy), "who ?", "-m", "tiny", "--max-new-tokens", "2", "--json"
    )
    first = run(monkeypatch, capsys, "ask", str(film_of_the_toy), "who ?", *options, "--subtitles", "film.srt")
    again = run(monkeypatch, capsys, "ask", "who ?", *options, "--subtitles", "film.srt")
    assert [plain[0], first[0], again[0]] == [0, 0, 0]
    assert json.loads(first[1])["prompt_tokens"] > json.loads(plain[1])["prompt_tokens"]
    assert json.loads(again[1])["token_ids"] == json.loads(first[1])["token_ids"]
    code, _, err = run(monkeypatch, capsys, "ask", "who ?", *options, "--subtitles", "auto")
    assert code == 2
    assert "subtitles was" in err


@pytest.mark.parametrize(("file", "message"), [("none.srt", "no such file"), ("auto", "give an .srt or .vtt file")])
def test_subtitles_that_are_not_there_are_refused(monkeypatch, capsys, film_of_the_toy, file, message):
    code, _, err = run(monkeypatch, capsys, "ask", str(film_of_the_toy), "who ?", "-m", "tiny", "--subtitles", file)
    assert (code, message in err) == (2, True)


def test_a_line_of_run_names_a_file_beside_the_questions(tmp_path):
    line = {"video": "a.mp4", "question": "who ?", "subtitles": "a.srt"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line))
    (question,) = read_questions(tmp_path / "questions.jsonl")
    assert question.sampling.subtitles == str(tmp_path / "a.srt")


def test_subtitles_that_changed_are_ingested_again(tmp_path):
    file = subtitle_file(tmp_path)
    before = _plain(file)
    subtitle_file(tmp_path, CUES[:1])
    assert _plain(file) != before


def test_one_file_for_several_videos_is_refused(film_of_the_toy, monkeypatch, capsys, tmp_path):
    film, file = str(film_of_the_toy), subtitle_file(tmp_path)
    with pytest.raises(OptionError, match="is one file for 2 videos: give 'auto', or in Python each its own"):
        tieredkv.open_session(PATH, [film, film], subtitles=file)
    with pytest.raises(OptionError, match="is one file for 2 videos"):
        tieredkv.plan(PATH, [film, film], subtitles=file)
    code, _, err = run(monkeypatch, capsys, "ask", film, film, "who ?", "-m", "tiny", "--subtitles", file)
    assert (code, "is one file for 2 videos" in err) == (2, True)
    videos = [film, tieredkv.Video(film, subtitles=file)]
    with tieredkv.open_session(PATH, videos) as session:
        assert [medium.facts.subtitles is None for medium in session.media] == [True, False]
