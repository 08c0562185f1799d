"""The disk must have room for a session before its video is ingested, which can take an hour."""

from __future__ import annotations

import pytest

from tieredkv.api import new_session
from tieredkv.errors import SessionError
from tieredkv.session import ingest
from tieredkv.storage import atomic
from tieredkv.video.sampling import Sampling


@pytest.fixture
def left(monkeypatch):
    """`left(nbytes)`: so much is free on every disk."""
    usage = atomic.shutil.disk_usage("/")
    return lambda nbytes: monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage._replace(free=nbytes))


@pytest.fixture
def session(video_model, processor):
    with new_session(video_model, gpu_kv_gb=1, processor=processor) as session:
        yield session


def test_a_disk_without_room_is_refused_before_anything_is_decoded(session, frames, left, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "Stages", lambda *_: pytest.fail("the ingest began"))
    left(50 * 1024)
    with pytest.raises(SessionError) as refusal:
        session.ingest(frames, Sampling(fps=4), save_to=tmp_path / "film.tkv")
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path}/film.tkv needs ")
    assert message.endswith(f" MiB of disk, 50 KiB free in {tmp_path}: free some, or save elsewhere.")
    assert session.video is None
    assert list(tmp_path.iterdir()) == []


def test_the_room_asked_for_is_that_of_the_file(session, frames, left, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ingest.header, "check_space", lambda path, nbytes: asked.append(nbytes))
    session.ingest(frames, Sampling(fps=4), save_to=tmp_path / "film.tkv")
    written = session.save(tmp_path / "film.tkv")
    header = 2**15  # of which the manifest is the larger part
    assert asked[0] * 0.98 <= written <= asked[0] + header


def test_without_a_file_to_save_to_nothing_is_asked_of_the_disk(session, frames, left):
    left(0)
    session.ingest(frames, Sampling(fps=4))
    assert session.video is not None
