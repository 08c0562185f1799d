"""A long ingest that was interrupted goes on from its checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import build
from helpers import session_logits

import tieredkv
from tieredkv.session import checkpoint as checkpoints
from tieredkv.session.session_file import cache_tensors

QUESTION = "what is it ?"


class Interruption(Exception):
    """What stops an ingest in these tests."""


@pytest.fixture
def often(monkeypatch):
    """A checkpoint after every call of the model."""
    monkeypatch.setattr(checkpoints, "is_due", lambda *seconds: True)


def interrupt_after(monkeypatch, checkpoint_number: int) -> None:
    """The ingest fails in the call after this checkpoint."""
    write, written = checkpoints.Checkpoint.write, []

    def writing(self, *args):
        write(self, *args)
        written.append(1)
        if len(written) == checkpoint_number:
            raise Interruption

    monkeypatch.setattr(checkpoints.Checkpoint, "write", writing)


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(
    "name",
    ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava_onevision", "video_llama_3", "minicpmv4_6", "gemma4", "lfm3_vl"],
)
def test_the_result_equals_that_of_an_ingest_without_interruption(name, at, often, monkeypatch, tmp_path):
    model, processor = build(name)
    film = np.random.default_rng(5).integers(0, 256, (41, 60, 90, 3), dtype=np.uint8)
    film[11:17] = film[11]
    options = {"gpu_kv_gb": 1, "fps": 4, "processor": processor, "prefill_chunk": 37, "encode_batch": 24}
    with tieredkv.open_session(model, film, **options) as session:
        expected = {key: tensor.clone() for key, tensor in cache_tensors(session._cached.cache).items()}
        grid, frames, logits = session.video, session.ingest_stats.frames, session_logits(session, QUESTION, 4)
    path = tmp_path / "film.tkv.checkpoint"
    with monkeypatch.context() as patch:
        interrupt_after(patch, at)
        with pytest.raises(Interruption):
            tieredkv.open_session(model, film, checkpoint=path, **options)
    with tieredkv.open_session(model, film, checkpoint=path, **options) as session:
        tensors = cache_tensors(session._cached.cache)
        assert {key for key in expected if not torch.equal(tensors[key], expected[key])} == set()
        assert session.video == grid
        assert session.ingest_stats.frames == frames
        assert torch.equal(session_logits(session, QUESTION, 4), logits)
        session.save(tmp_path / "film.tkv")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["film.tkv"]
