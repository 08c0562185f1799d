"""The conversation beside a session file: kept without writing the session again, and never mixed up."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import tieredkv
from tieredkv.errors import SessionError
from tieredkv.session.conversation_file import ConversationFile, check
from tieredkv.storage import atomic, tensor_file

STAR, MOON = "what colour was the star ?", "follow the moon for 4 ?"
OWN = [("first ?", "one")]
TALK = [("first ?", "one"), ("täglich \U0001f3ac ?", 'two\n"words"')]


@pytest.fixture
def film(tmp_path):
    """A session file, and the checksum of its header."""
    _, checksum = tensor_file.write(tmp_path / "film.tkv", {"of": 1}, {"a": torch.zeros(9)})
    return tmp_path / "film.tkv", checksum


def test_what_is_kept_is_read_again_beside_the_same_file(film):
    beside = ConversationFile(*film, OWN)
    assert beside.turns == OWN
    assert beside.write(TALK)
    assert ConversationFile(*film, OWN).turns == TALK


def test_the_session_file_is_not_touched_and_nothing_else_is_left(film):
    before, content = film[0].stat(), film[0].read_bytes()
    ConversationFile(*film, []).write(TALK)
    now = film[0].stat()
    assert (now.st_ino, now.st_mtime_ns, film[0].read_bytes()) == (before.st_ino, before.st_mtime_ns, content)
    assert sorted(path.name for path in film[0].parent.iterdir()) == ["film.tkv", "film.tkv.chat"]


def test_turns_that_are_kept_already_are_not_written(film):
    assert not ConversationFile(*film, OWN).write(OWN)
    assert not (film[0].parent / "film.tkv.chat").exists()
    beside = ConversationFile(*film, OWN)
    beside.write(TALK)
    assert not beside.write(TALK)


def test_a_cleared_conversation_is_kept_cleared(film):
    ConversationFile(*film, OWN).write([])
    assert ConversationFile(*film, OWN).turns == []


def test_beside_another_file_of_that_name_it_counts_as_absent_and_may_be_overwritten(film):
    path, checksum = film
    ConversationFile(path, checksum, []).write(TALK)
    _, other = tensor_file.write(path, {"of": 2}, {"a": torch.zeros(9)})
    beside = ConversationFile(path, other, OWN)
    assert beside.turns == OWN
    beside.write([])
    assert ConversationFile(path, other, OWN).turns == []


@pytest.mark.parametrize("change", ["replaced", "removed", "cut"])
def test_a_session_file_that_changed_meanwhile_gets_no_conversation(film, change):
    path, checksum = film
    beside = ConversationFile(path, checksum, OWN)
    if change == "replaced":
        tensor_file.write(path, {"of": 2}, {"a": torch.zeros(9)})
    elif change == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SessionError, match=r"film\.tkv.*(replaced by another program|no such file|cut short)"):
        beside.write(TALK)
    assert not path.with_name("film.tkv.chat").exists()


def test_of_two_conversations_at_once_the_second_is_not_written_over_the_first(film):
    one, two = ConversationFile(*film, []), ConversationFile(*film, [])
    one.write(TALK)
    with pytest.raises(SessionError, match=r"film\.tkv\.chat was written by another program meanwhile"):
        two.write(OWN)
    assert ConversationFile(*film, []).turns == TALK
    assert one.write(OWN)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("two", "six"),
        lambda text: text[:-20],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: '{"of": "another program"}',
        lambda text: text.replace('"turns": [', '"turns": [7, '),
    ],
)
def test_a_damaged_conversation_is_refused(film, damage):
    ConversationFile(*film, []).write(TALK)
    path = film[0].with_name("film.tkv.chat")
    path.write_text(damage(path.read_text()))
    with pytest.raises(SessionError, match=r"film\.tkv\.chat is damaged, or another program's: move it away"):
        ConversationFile(*film, [])


def test_bytes_that_are_no_text_and_a_newer_format_are_refused(film):
    path = film[0].with_name("film.tkv.chat")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SessionError, match=r"film\.tkv\.chat cannot be read"):
        ConversationFile(*film, [])
    path.write_text(json.dumps({"tieredkv_chat": 2}))
    with pytest.raises(SessionError, match="written by a newer tieredkv: update"):
        ConversationFile(*film, [])


def test_a_failing_disk_leaves_what_was_kept(film, monkeypatch):
    beside = ConversationFile(*film, [])
    beside.write(OWN)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(SessionError, match=r"film\.tkv\.chat could not be written: No space left on device"):
        beside.write(TALK)
    assert ConversationFile(*film, []).turns == OWN
    assert beside.turns == OWN


# In a session


@pytest.fixture
def saved(video_model, processor, frames, tmp_path):
    with tieredkv.open_session(video_model, frames, gpu_kv_gb=1, processor=processor, fps=4) as session:
        session.chat(STAR, max_new_tokens=2)
        session.save(tmp_path / "film.tkv")
    return tmp_path / "film.tkv"


@pytest.fixture
def load(video_model, processor):
    return lambda path: tieredkv.load_session(path, video_model, processor=processor)


def test_a_session_continues_the_conversation_that_was_kept(saved, load):
    before = saved.stat().st_mtime_ns
    with load(saved) as session:
        session.chat(MOON, max_new_tokens=2)
        assert session.save_conversation(saved)
        assert not session.save_conversation(saved)
        there = session.chat(STAR, max_new_tokens=3).token_ids
    assert saved.stat().st_mtime_ns == before
    with load(saved) as session:
        assert [question for question, _ in session.history] == [STAR, MOON]
        assert session.chat(STAR, max_new_tokens=3).token_ids == there


def test_a_session_that_was_just_saved_keeps_its_conversation_too(video_model, processor, frames, load, tmp_path):
    path = tmp_path / "film.tkv"
    with tieredkv.open_session(video_model, frames, gpu_kv_gb=1, processor=processor, fps=4) as session:
        assert not session.save_conversation(path)
        session.chat(STAR, max_new_tokens=2)
        with pytest.raises(SessionError, match="does not hold this session, so the conversation is not kept: save it"):
            session.save_conversation(path)
        session.save(path)
        session.chat(MOON, max_new_tokens=2)
        assert session.save_conversation(path)
    with load(path) as session:
        assert len(session.history) == 2


def test_saving_the_session_ends_what_was_kept_beside_it(saved, load):
    with load(saved) as session:
        session.save_conversation(saved)
        session.chat(MOON, max_new_tokens=2)
        session.save_conversation(saved)
        session.clear_history()
        session.chat(STAR, max_new_tokens=2)
        session.save(saved)  # the very bytes of the first
    assert [path.name for path in saved.parent.iterdir()] == ["film.tkv"]
    with load(saved) as session:
        assert len(session.history) == 1


def test_a_file_of_another_program_is_not_removed(saved, load):
    other = saved.with_name("film.tkv.chat")
    with load(saved) as session:
        other.write_text("notes of mine")
        before = saved.stat().st_ino
        with pytest.raises(SessionError, match="another program's: move it away"):
            session.save(saved)
        assert saved.stat().st_ino == before
    assert other.read_text() == "notes of mine"
    with pytest.raises(SessionError, match="another program's: move it away"):
        load(saved)


def test_a_name_that_no_file_can_have_is_refused_as_a_session(tmp_path):
    with pytest.raises(SessionError, match="is not a file name"):
        check(tmp_path / "null \0.tkv")


@pytest.mark.subprocess
def test_it_needs_no_torch():
    code = "import sys, tieredkv.session.conversation_file; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
