"""vLLM's words for sampling, as ours; a word that does not work is refused by name."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from tieredkv.serve.errors import ApiError
from tieredkv.serve.protocol.sampling import WORDS, read_kwargs, sampling_of
from tieredkv.serve.settings import Settings
from tieredkv.video.sampling import Sampling


@pytest.mark.parametrize(
    ("video", "processor", "fields"),
    [
        (None, None, {}),
        ({"fps": 2, "num_frames": 32}, None, {"fps": 2, "max_frames": 32}),
        ({"num_frames": -1, "fps": -1}, None, {}),
        ({"start": 10, "end": 20.5}, None, {"start": 10, "end": 20.5}),
        ({"video_start": 10}, None, {"start": 10}),
        (None, {"fps": 1, "do_sample_frames": True, "max_pixels": 50176}, {"fps": 1, "max_pixels": 50176}),
        ({"fps": 2}, {"fps": 1, "max_frames": 8}, {"fps": 2, "max_frames": 8}),
        ({"frame_recovery": True}, None, {"skip_damaged": True}),
        ({"fps": None}, None, {}),
    ],
)
def test_words_set_how_a_film_is_sampled(video, processor, fields):
    assert read_kwargs(None if video is None else {"video": video}, processor) == fields


@pytest.mark.parametrize(
    ("media_io", "processor", "words"),
    [
        ({"video": {"fsp": 1}}, None, "did you mean fps"),
        ({"video": {"video_backend": "opencv"}}, None, "media_io_kwargs.video.video_backend is not supported"),
        ({"video": {"max_duration": 9}}, None, "give end"),
        (None, {"size": {"longest_edge": 9}}, "give max_pixels"),
        (None, {"do_sample_frames": False}, "always sampled"),
        ({"audio": {"sr": 1}}, None, "media_io_kwargs.audio is not supported"),
        ({"video": 3}, None, "media_io_kwargs.video is not an object"),
        ({"video": {"fps": 0}}, None, "fps=0 is not valid"),
        ({"video": {"fps": "2"}}, None, "fps='2' is not valid"),
        ({"video": {"start": 10**400}}, None, "is not valid"),
        ({"video": {"num_frames": 8, "max_frames": 9}}, None, "says otherwise"),
        ({"video": {"source_fps": 8}}, None, "not a word"),
        ({"video": {"subtitles": "/etc/passwd"}}, None, "not a word"),
    ],
)
def test_words_that_do_not_work_are_refused_by_name(media_io, processor, words):
    with pytest.raises(ApiError, match=r"\.$|\?$") as refused:
        read_kwargs(media_io, processor)
    assert words in refused.value.message
    assert refused.value.param


def test_the_servers_defaults_hold_for_what_is_not_said():
    settings = Settings(fps=1.0, max_frames=100, max_pixels=50176)
    assert sampling_of("video", {"fps": 2}, settings) == Sampling(fps=2, max_frames=100, max_pixels=50176)


def test_of_a_picture_only_the_pixels_count():
    settings = Settings(fps=1.0, max_frames=100)
    assert sampling_of("image", {"fps": 2, "max_pixels": 1024}, settings) == Sampling(max_pixels=1024)


def test_values_that_contradict_each_other_are_refused():
    with pytest.raises(ApiError, match="end=3 is not valid"):
        sampling_of("video", {"start": 5, "end": 3}, Settings())


def test_no_word_names_a_file():
    assert "subtitles" not in WORDS.values()
