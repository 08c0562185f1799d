"""The engine and the folder of sessions: what was ingested once is not ingested again, and no file is trusted."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading

import pytest
from engine_examples import (
    OTHER,
    QUESTION,
    Films,
    Running,
    all_of,
    answer_of,
    eventually,
    question,
    until,
)

from tieredkv.errors import SessionError
from tieredkv.memory.units import GIB
from tieredkv.models.loading import load
from tieredkv.serve.asked import Progress
from tieredkv.session import checkpoint as checkpoints
from tieredkv.session.video_session import VideoSession
from tieredkv.storage import tensor_file
from tieredkv.tiny.model import PATH

pytestmark = [pytest.mark.model, pytest.mark.threads]


@pytest.fixture(scope="session")
def kept(toy, short_video, tmp_path_factory):
    """A folder of sessions with one film's, and the answer to the question about it."""
    folder = tmp_path_factory.mktemp("kept")

    async def ask():
        async with Running(*toy, sessions=folder) as engine:
            return await answer_of(engine.ask(question(short_video)))

    return folder, asyncio.run(ask()).generation


@pytest.fixture
def folder(kept, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(kept[0], tmp_path / "sessions")


@pytest.fixture
def films():
    return Films()


def only_file(folder):
    (file,) = folder.iterdir()
    return file


async def test_a_session_is_found_across_restarts_and_nothing_is_decoded(toy, films, folder, kept, short_video):
    async with Running(*toy, films, sessions=folder) as engine:
        events = await all_of(engine.ask(question(short_video)))
        stages = {event.stage for event in events if isinstance(event, Progress)}
        assert events[-1].reused
        assert events[-1].generation.token_ids == kept[1].token_ids
        assert "load" in stages
        assert "ingest" not in stages
        assert films.ingested == []
        counts, disk = engine.snapshot().counts, engine.snapshot().disk
        assert (counts.loaded, counts.ingested) == (1, 0)
        assert (disk.sessions, disk.nbytes) == (1, only_file(folder).stat().st_size)


async def test_the_same_film_under_another_name_is_found(toy, films, folder, short_video, tmp_path):
    renamed = shutil.copy(short_video, tmp_path / "another.mp4")
    async with Running(*toy, films, sessions=folder) as engine:
        assert (await answer_of(engine.ask(question(renamed)))).reused


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-5000] ^= 255
    file.write_bytes(data)


def foreign(file):
    """Another film's session, under this one's name."""
    stored = tensor_file.read(file)
    manifest = dict(stored.manifest)
    video = {**manifest["session"]["video"], "sha256": "0" * 64}
    manifest["session"] = {**manifest["session"], "video": video}
    tensor_file.write(file, manifest, {name: stored.tensor(name).clone() for name in stored.names})


@pytest.mark.parametrize("damage", [cut, flip, foreign])
async def test_a_damaged_or_foreign_file_is_reported_and_replaced(
    toy, films, folder, kept, short_video, caplog, damage
):
    file = only_file(folder)
    damage(file)
    with caplog.at_level(logging.WARNING):
        async with Running(*toy, films, sessions=folder) as engine:
            answer = await answer_of(engine.ask(question(short_video)))
    assert not answer.reused
    assert answer.generation.token_ids == kept[1].token_ids
    assert [file.name in record.getMessage() for record in caplog.records] == [True]
    async with Running(*toy, films, sessions=folder) as engine:
        assert (await answer_of(engine.ask(question(short_video)))).reused
    assert len(films.ingested) == 1


async def test_a_full_disk_does_not_lose_the_answer(toy, films, short_video, tmp_path, caplog, monkeypatch):
    def full(session, path):
        raise SessionError(f"{path} needs 1 GB of disk, 1 MB free: free some, or save elsewhere.")

    monkeypatch.setattr(VideoSession, "save", full)
    with caplog.at_level(logging.WARNING):
        async with Running(*toy, films, sessions=tmp_path / "new") as engine:
            assert (await answer_of(engine.ask(question(short_video)))).generation.text
            assert (await answer_of(engine.ask(question(short_video, OTHER)))).reused
    assert len(films.ingested) == 1
    assert "not kept on disk" in caplog.text


async def test_a_session_larger_than_the_folder_may_be_is_answered_from_memory(
    toy, films, short_video, tmp_path, caplog
):
    with caplog.at_level(logging.WARNING):
        async with Running(*toy, films, sessions=tmp_path / "new", sessions_gb=1e-5) as engine:
            assert (await answer_of(engine.ask(question(short_video)))).generation.text
            assert engine.snapshot().disk.nbytes == 0
    assert "--sessions-gb" in caplog.text


@pytest.mark.parametrize("keeps", [True, False], ids=["with a folder", "without"])
async def test_a_session_that_leaves_memory_is_loaded_again_or_gone(toy, films, short_video, tmp_path, keeps):
    async with Running(*toy) as engine:
        await answer_of(engine.ask(question(short_video)))
        one = engine.snapshot().host.nbytes
    folder = tmp_path / "new" if keeps else None
    async with Running(*toy, films, sessions=folder, open_gb=1.5 * one / GIB) as engine:
        first = await answer_of(engine.ask(question(short_video)))
        await answer_of(engine.ask(question(short_video, end=29)))
        state = engine.snapshot()
        assert state.host.sessions == 1
        assert state.host.nbytes <= state.host.most_bytes
        again = await answer_of(engine.ask(question(short_video)))
        assert again.reused == keeps
        assert again.generation.token_ids == first.generation.token_ids
        assert len(films.ingested) == (2 if keeps else 3)


async def test_two_servers_on_one_folder_do_not_get_in_each_others_way(toy, films, short_video, tmp_path):
    folder = tmp_path / "shared"
    async with Running(*toy, films, sessions=folder) as one, Running(*toy, films, sessions=folder) as other:
        answers = await asyncio.gather(*(answer_of(engine.ask(question(short_video))) for engine in (one, other)))
        assert answers[0].generation.token_ids == answers[1].generation.token_ids
        later = [await answer_of(engine.ask(question(short_video, OTHER))) for engine in (one, other)]
        assert [answer.reused for answer in later] == [True, True]
    async with Running(*toy, films, sessions=folder) as third:
        assert (await answer_of(third.ask(question(short_video)))).reused
    assert only_file(folder).suffix == ".tkv"


async def test_an_ingest_that_was_stopped_goes_on_from_its_checkpoint(
    toy, films, short_video, tmp_path, monkeypatch, kept
):
    monkeypatch.setattr(checkpoints, "is_due", lambda *seconds: True)
    folder = tmp_path / "new"
    async with Running(*toy, films, sessions=folder) as engine:
        events = engine.ask(question(short_video))
        async for event in events:
            if isinstance(event, Progress) and event.stage == "ingest" and event.done:
                films.gate.clear()
                break
        await events.aclose()
        await eventually(lambda: not engine.snapshot().running)
        assert only_file(folder).suffix == ".checkpoint"
        assert engine.snapshot().disk.nbytes > 0
        films.gate.set()
        events = engine.ask(question(short_video))
        first = await until(events, Progress, "ingest")
        answer = (await all_of(events))[-1]
    assert not answer.reused
    assert first.total is None or first.done > 0
    assert answer.generation.token_ids == kept[1].token_ids
    assert only_file(folder).suffix == ".tkv"


@pytest.mark.parametrize("saving", ["before", "during"])
async def test_a_session_whose_reader_leaves_while_it_is_saved_is_kept(
    toy, films, short_video, tmp_path, monkeypatch, saving
):
    reached, left, save = threading.Event(), threading.Event(), VideoSession.save

    def slow(session, path):
        written = save(session, path) if saving == "during" else 0
        reached.set()
        assert left.wait(60)
        return written or save(session, path)

    monkeypatch.setattr(VideoSession, "save", slow)
    async with Running(*toy, films, sessions=tmp_path / "new") as engine:
        events = engine.ask(question(short_video))
        await until(events, Progress, "ingest")
        await eventually(reached.is_set)
        await events.aclose()
        left.set()
        await eventually(lambda: not engine.snapshot().running)
        answer = await answer_of(engine.ask(question(short_video)))
        assert answer.reused
        assert engine.snapshot().disk.sessions == 1
    assert len(films.ingested) == 1


async def test_a_session_whose_reader_leaves_as_it_is_loaded_can_be_asked_later(
    toy, films, folder, short_video, monkeypatch
):
    reached, left, restore = threading.Event(), threading.Event(), VideoSession.restore

    def slow(session, stored):
        restore(session, stored)
        reached.set()
        assert left.wait(60)

    monkeypatch.setattr(VideoSession, "restore", slow)
    async with Running(*toy, films, sessions=folder) as engine:
        events = engine.ask(question(short_video))
        await until(events, Progress, "load")
        await eventually(reached.is_set)
        await events.aclose()
        left.set()
        await eventually(lambda: not engine.snapshot().running)
        assert (await answer_of(engine.ask(question(short_video)))).reused


async def test_another_model_has_other_sessions(toy, films, folder, short_video):
    model, processor = load(str(PATH), None)
    weight = model.get_decoder().layers[0].mlp.down_proj.weight
    weight.data[0, 0] += 1
    async with Running(model, processor, films, sessions=folder) as engine:
        assert not (await answer_of(engine.ask(question(short_video, QUESTION)))).reused
    assert len(list(folder.iterdir())) == 2


async def test_a_file_that_was_changed_in_place_fails_one_question_and_is_opened_anew(toy, folder, short_video):
    async with Running(*toy, sessions=folder) as engine:
        assert (await answer_of(engine.ask(question(short_video)))).reused
        file = only_file(folder)
        file.write_bytes(file.read_bytes())
        with pytest.raises(SessionError, match="changed while it was in use"):
            await all_of(engine.ask(question(short_video, OTHER)))
        assert (await answer_of(engine.ask(question(short_video, OTHER)))).reused
        assert engine.snapshot().counts.loaded == 2
