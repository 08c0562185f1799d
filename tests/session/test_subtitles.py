"""Subtitles written between the frames: their places, that transformers would read the same prompt, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import BUILD, build
from helpers import RecordLogits, assert_near, session_logits, stock_logits, tier_options
from test_several_media import RecordIds, noise, stock

import tieredkv
from tieredkv.errors import PromptError, SessionError, UnsupportedModelError, VideoError
from tieredkv.models import families
from tieredkv.video.frames import Sampled, open_video
from tieredkv.video.sampling import Sampling
from tieredkv.video.subtitles import Cue

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


def takes_text(name: str) -> bool:
    _, processor = build(name)
    family = families.VIDEO_FAMILIES[name]
    return family.introduction(processor, 0, [0.0]) is not None


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
    added = [line for line in written(processor, ids).split("Subtitle: ")[1:]]
    assert len(added) == 3
    text = written(processor, ids)
    for line in ("Good morning.", "Who is there?", "A friend."):
        begin = text.index("Subtitle: ")
        end = text.index("\n", begin) + 1
        assert text[begin:end].removesuffix("\n").endswith(line)
        text = text[:begin] + text[end:]
    assert text == written(processor, plain)
    visual = set(torch.tensor(plain)[inputs["mm_token_type_ids"][0] > 0].tolist()) if "mm_token_type_ids" in inputs else set()
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if visual:
        kinds = inputs["mm_token_type_ids"][inputs["mm_token_type_ids"] > 0].unique()
        assert len(kinds) == 1
        inputs["mm_token_type_ids"] = torch.tensor([[int(kinds) if each in visual else 0 for each in ids]])
    assert_near(torch.cat(record.seen), stock_logits(model, inputs, 4))
