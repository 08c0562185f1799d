"""The demo end to end, on the trained model."""

from __future__ import annotations

import json

import pytest

from tieredkv.demo.answers import right_hops, right_words
from tieredkv.demo.run import run
from tieredkv.errors import OutputError
from tieredkv.storage import atomic
from tieredkv.tiny.scene import SceneQuestion

CHAIN = SceneQuestion("follow the star for 2 ?", ("f", "heart", "k", "moon"), "chain", ((0, 1),) * 4)


@pytest.mark.parametrize(
    ("answer", "words", "hops"),
    [
        ("f heart k moon", 4, 2),
        ("f heart k ring", 3, 1),
        ("f moon k moon", 3, 1),
        ("f heart", 2, 1),
        ("", 0, 0),
        ("f heart k moon c ring", 4, 2),
    ],
)
def test_words_and_hops_are_counted_in_their_place(answer, words, hops):
    assert right_words(CHAIN, answer) == words
    assert right_hops(CHAIN, answer) == hops


FIELDS = (
    "questions visual_tokens accuracy_tiered accuracy_full hop_accuracy_tiered hop_accuracy_full kv_full_bytes "
    "kv_cap_bytes kv_device_peak_bytes kv_host_bytes static_heads dynamic_heads hit_rate moved_bytes ingest_s ttft_s "
    "tpot_ms seconds versions"
).split()


@pytest.mark.model
def test_the_demo_passes_draws_its_picture_and_ends_with_json(tmp_path, capsys):
    picture, video = tmp_path / "where.png", tmp_path / "kept.mp4"
    passed = run(seed=1_000_010, minutes=2.2, share=0.3, plot=picture, video_path=video, as_json=False)
    lines = capsys.readouterr().out.strip().splitlines()
    report = json.loads(lines[-1])
    assert passed
    assert list(report) == FIELDS
    assert report["questions"] >= 8
    assert report["visual_tokens"] >= 1000
    assert report["kv_cap_bytes"] <= 0.3 * report["kv_full_bytes"]
    assert report["kv_device_peak_bytes"] <= report["kv_cap_bytes"]
    assert report["accuracy_full"] >= 0.9
    assert report["hit_rate"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert video.stat().st_size > 0
    assert sorted(tmp_path.iterdir()) == sorted([picture, video])


@pytest.fixture
def few_questions(monkeypatch):
    """The full cache, which reads the video again for each question, takes most of the time."""
    monkeypatch.setattr("tieredkv.demo.run.QUESTIONS", 4)


@pytest.mark.model
def test_as_json_prints_one_object_and_nothing_else(few_questions, capsys):
    run(seed=1_000_011, minutes=2, share=0.3, plot=None, video_path=None, as_json=True)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert list(json.loads(out)) == FIELDS


@pytest.mark.model
def test_the_demo_fails_if_the_answers_are_worse(few_questions, torch_operations, monkeypatch, capsys):
    """A policy that picks random chunks must not pass."""
    import torch

    from tieredkv.policy import select

    monkeypatch.setitem(select.GROUPS, "mean", lambda logits: torch.rand(logits.shape[0], logits.shape[-1]))
    assert not run(seed=1_000_010, minutes=4.2, share=0.15, plot=None, video_path=None, as_json=True)


def test_a_full_disk_is_one_sentence(monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(OutputError, match=r"v\.mp4 could not be written: No space left on device\."):
        run(seed=1, minutes=2, share=0.5, plot=None, video_path=tmp_path / "v.mp4", as_json=True)
    assert not list(tmp_path.iterdir())
