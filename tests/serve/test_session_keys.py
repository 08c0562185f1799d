"""Keys of sessions: whatever decides the cache decides the key, and nothing else does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tieredkv.config import TierConfig
from tieredkv.models.encode import at_processor_rate
from tieredkv.serve.asked import Film, Shown
from tieredkv.serve.engine.key import Keys
from tieredkv.video.sampling import Sampling

TIERS = TierConfig(gpu_kv_gb=1)
FILM, OTHER = (Shown(Film(Path("/films/a.mp4"), letter * 64, "a.mp4")) for letter in "ab")


@pytest.fixture(scope="module")
def keys(video_model, processor):
    return Keys(video_model, processor, TIERS)


def sampled(**values) -> list[Shown]:
    return [replace(FILM, sampling=Sampling(**values))]


@pytest.mark.parametrize(
    ("one", "same"),
    [
        (sampled(fps=2), sampled(fps=2.0)),
        (sampled(end=5), sampled(end=5.0)),
        ([FILM], [replace(FILM, film=replace(FILM.film, path=Path("/elsewhere/b.mp4"), name="b.mp4"))]),
        (sampled(), sampled(source_fps=25)),
    ],
)
def test_what_does_not_change_the_cache_does_not_change_the_key(keys, one, same):
    assert keys.of(one, None) == keys.of(same, None)


def test_the_processors_own_rate_is_that_rate(keys, processor):
    rate = at_processor_rate(Sampling(), processor).fps
    assert keys.of([FILM], None) == keys.of(sampled(fps=rate), None) != keys.of(sampled(fps=rate + 1), None)


def image(**values) -> list[Shown]:
    return [Shown(replace(FILM.film, kind="image"), Sampling(**values))]


def test_everything_that_changes_the_cache_changes_the_key(keys):
    shown = [
        [FILM],
        [OTHER],
        [FILM, OTHER],
        [OTHER, FILM],
        image(),
        image(max_pixels=4096),
        sampled(fps=3),
        sampled(max_frames=9),
        sampled(start=1),
        sampled(end=9),
        sampled(max_pixels=4096),
        sampled(skip_damaged=True),
        sampled(subtitles="auto"),
        sampled(fit=True),
    ]
    every = [keys.of(media, system) for media in shown for system in (None, "Be brief.", "Be long.")]
    assert len(set(every)) == len(every)


def test_a_picture_has_no_times(keys):
    assert keys.of(image(fps=4, end=3), None) == keys.of(image(), None)


@pytest.mark.parametrize("changes", [{"chunk_tokens": 16}, {"host_kv_bits": 8}])
def test_how_the_cache_is_kept_changes_the_key(keys, video_model, processor, changes):
    assert Keys(video_model, processor, replace(TIERS, **changes)).of([FILM], None) != keys.of([FILM], None)


def test_the_cap_matters_only_where_sampling_was_fitted_to_it(keys, video_model, processor):
    larger = Keys(video_model, processor, replace(TIERS, gpu_kv_gb=2))
    assert larger.of([FILM], None) == keys.of([FILM], None)
    assert larger.of(sampled(fit=True), None) != keys.of(sampled(fit=True), None)


def test_weights_and_the_processor_change_the_key(keys, video_model, processor, monkeypatch):
    weight = next(video_model.parameters())
    before = weight.data.flatten()[0].clone()
    weight.data.flatten()[0] = before + 1
    try:
        assert Keys(video_model, processor, TIERS).of([FILM], None) != keys.of([FILM], None)
    finally:
        weight.data.flatten()[0] = before
    assert Keys(video_model, processor, TIERS).of([FILM], None) == keys.of([FILM], None)
    monkeypatch.setattr(processor.video_processor, "patch_size", 7)
    assert Keys(video_model, processor, TIERS).of([FILM], None) != keys.of([FILM], None)
