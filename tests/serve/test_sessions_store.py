"""Sessions over three tiers: the least recently used leave, each tier stays under its cap, what is in use stays."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tieredkv.errors import BudgetError
from tieredkv.serve.engine.files import DIGITS, Lock, SessionFiles
from tieredkv.serve.engine.sessions import OpenSession, Sessions


class FakeSession:
    """Takes what it is told to."""

    def __init__(self, nbytes: int) -> None:
        self.host_bytes, self.device_bytes, self.closed = nbytes, nbytes, False

    def leave_device(self) -> None:
        self.device_bytes = 0

    def close(self) -> None:
        self.closed, self.host_bytes, self.device_bytes = True, 0, 0


def key(number: int) -> str:
    return f"{number:064x}"[::-1]


def opened(sessions: Sessions, number: int, nbytes: int, lock: Lock | None = None) -> OpenSession:
    """A session that is opened as `Opening` does."""
    sessions.expect(nbytes)
    sessions.leave_device()
    return sessions.add(OpenSession(key(number), FakeSession(nbytes), nbytes, lock))


def saved(files: SessionFiles, number: int, nbytes: int) -> Path | None:
    """A file of so many bytes; None if there is no room."""
    if not files.make_room(nbytes):
        return None
    path = files.name(key(number), f"film{number}.mp4")
    path.write_bytes(bytes(nbytes))
    used(files, path)
    return path


CLOCK = iter(range(10**9, 10**10))


def used(files: SessionFiles, path: Path) -> None:
    """A second later than whatever was used before."""
    if (lock := files.use(path)) is not None:
        lock.close()
        os.utime(path, (next(CLOCK), path.stat().st_mtime))


@pytest.fixture
def files(tmp_path):
    return SessionFiles(tmp_path / "sessions", 100)


# ---- in memory


def test_the_least_recently_used_session_is_closed_for_another():
    sessions = Sessions(100)
    first, second = opened(sessions, 1, 40), opened(sessions, 2, 40)
    assert sessions.find(key(1)) is first
    opened(sessions, 3, 40)
    assert second.session.closed
    assert sessions.find(key(2)) is None
    assert sessions.find(key(1)) is first


def test_only_the_session_that_is_asked_is_on_the_device():
    sessions = Sessions(100)
    first, second = opened(sessions, 1, 40), opened(sessions, 2, 40)
    assert (first.session.device_bytes, second.session.device_bytes) == (0, 40)
    first.session.device_bytes = 7
    with sessions.in_use(first):
        assert (first.session.device_bytes, second.session.device_bytes) == (7, 0)
    assert sessions.tiers(50)["device"].nbytes == 7


def test_a_session_in_use_is_not_closed_and_what_does_not_fit_beside_it_is_refused():
    sessions = Sessions(100)
    first, second = opened(sessions, 1, 60), opened(sessions, 2, 30)
    with sessions.in_use(first), pytest.raises(BudgetError, match="--open-gb"):
        sessions.expect(50)
    assert not first.session.closed
    assert not second.session.closed
    sessions.expect(50)
    assert first.session.closed


def test_a_session_larger_than_the_cap_closes_no_other():
    sessions = Sessions(100)
    first = opened(sessions, 1, 60)
    with pytest.raises(BudgetError):
        sessions.expect(101)
    assert not first.session.closed


def test_a_session_that_is_being_opened_counts():
    sessions = Sessions(100)
    sessions.expect(70)
    first = sessions.add(OpenSession(key(1), FakeSession(70), 70))
    sessions.expect(30)
    assert not first.session.closed
    sessions.give_up()
    sessions.expect(31)
    assert first.session.closed


def test_a_session_that_grew_over_the_cap_closes_others():
    sessions = Sessions(100)
    first, second = opened(sessions, 1, 40), opened(sessions, 2, 40)
    second.session.host_bytes = 70
    sessions.settle()
    assert first.session.closed
    assert not second.session.closed


def test_sessions_are_closed_with_their_locks(files):
    sessions = Sessions(100, files)
    path = saved(files, 1, 10)
    opened(sessions, 1, 40, files.use(path))
    sessions.close()
    assert sessions.tiers(0)["host"].sessions == 0
    assert files.make_room(100)
    assert not path.exists()


# ---- on disk


def test_the_least_recently_used_file_leaves(files):
    first, second = saved(files, 1, 40), saved(files, 2, 40)
    used(files, first)
    third = saved(files, 3, 40)
    assert [path.exists() for path in (first, second, third)] == [True, False, True]


def test_a_file_is_found_by_its_key_whatever_it_is_called(files):
    path = saved(files, 1, 10)
    renamed = path.rename(path.with_name(f"holiday-{key(1)[:DIGITS]}.tkv"))
    assert files.find(key(1)) == files.name(key(1), "other.mp4") == renamed
    assert files.find(key(2)) is None


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b.mp4", ".hidden", "", "film\nname", "x" * 300])
def test_the_name_of_a_film_is_never_a_path(files, name):
    path = files.name(key(1), name)
    assert path.parent == files.folder
    assert len(path.name) < 100
    path.touch()
    assert files.find(key(1)) == path


def test_files_of_others_are_left_alone_and_do_not_count(files):
    strangers = [files.folder / name for name in ("film.tkv", "film-0123456789abcdef.tkv", "notes.txt")]
    for path in strangers:
        path.write_bytes(bytes(90))
    assert files.make_room(100)
    assert all(path.exists() for path in strangers)


def test_what_is_larger_than_the_cap_removes_nothing(files):
    path = saved(files, 1, 40)
    assert not files.make_room(101)
    assert path.exists()


def test_what_is_beside_a_file_leaves_with_it_and_checkpoints_count(files):
    path = saved(files, 1, 40)
    path.with_name(path.name + ".chat").write_text("{}")
    checkpoint = files.folder / f"other-{key(2)[:DIGITS]}.tkv.checkpoint"
    checkpoint.mkdir()
    (checkpoint / "state").write_bytes(bytes(50))
    os.utime(checkpoint / "state", (1, 1))
    assert files.make_room(20)
    assert path.exists()
    assert not checkpoint.exists()
    assert files.make_room(100)
    assert list(files.folder.iterdir()) == []


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "rb")
fcntl.flock(file, fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.read()
"""
"""Another server that uses a file until its input ends."""


@pytest.mark.subprocess
def test_a_file_that_another_server_uses_stays(files):
    first, second = saved(files, 1, 40), saved(files, 2, 40)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, first], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    assert files.make_room(60)
    assert first.exists()
    assert not second.exists()
    assert not files.make_room(61)
    other.communicate("")
    assert files.make_room(61)
    assert not first.exists()


def test_a_session_that_reads_a_file_is_closed_before_the_file_leaves(files):
    sessions = Sessions(100, files)
    path = saved(files, 1, 60)
    reader = opened(sessions, 1, 20, files.use(path))
    with sessions.in_use(reader):
        assert not sessions.make_room_on_disk(60)
    assert not reader.session.closed
    assert sessions.make_room_on_disk(60)
    assert reader.session.closed
    assert not path.exists()


# ---- all together

STEPS = st.lists(
    st.tuples(st.sampled_from(["ask", "hold", "release", "grow"]), st.integers(0, 5), st.integers(1, 60)), max_size=40
)


@given(STEPS)
@settings(max_examples=60, deadline=None)
def test_caps_hold_and_what_is_in_use_never_leaves(steps):
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files = SessionFiles(Path(folder), 100)
        sessions = Sessions(100, files)
        held: list[tuple[OpenSession, ExitStack]] = []
        for action, number, nbytes in steps:
            if action == "release" and held:
                held.pop()[1].close()
            elif action in ("ask", "hold"):
                found = sessions.find(key(number))
                if found is None:
                    path = files.find(key(number))
                    try:
                        found = opened(sessions, number, nbytes, None if path is None else files.use(path))
                    except BudgetError:
                        continue
                    if path is None and sessions.make_room_on_disk(nbytes):
                        saved(files, number, nbytes)
                using = ExitStack()
                using.enter_context(sessions.in_use(found))
                stack.callback(using.close)
                if action == "hold":
                    held.append((found, using))
                else:
                    using.close()
            elif action == "grow" and (found := sessions.find(key(number))) is not None:
                found.session.host_bytes = min(found.session.host_bytes + 5, 100)
                sessions.settle()
            tiers = sessions.tiers(0)
            in_use = sum(each.nbytes for each, _ in {id(each): (each, using) for each, using in held}.values())
            assert tiers["host"].nbytes <= max(100, in_use)
            assert tiers["disk"].nbytes <= 100
            assert not any(each.session.closed for each, _ in held)
            on_device = [each for each in sessions._open.values() if each.session.device_bytes and not each.users]
            assert len(on_device) <= 1
