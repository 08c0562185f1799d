"""A file is replaced whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tieredkv.errors import OutputError, TieredKVError
from tieredkv.storage import atomic
from tieredkv.storage.atomic import check_target, replace_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "clip [1].kv"
    file.write_text("old")
    return file


def only_the_old(path: Path) -> bool:
    return list(path.parent.iterdir()) == [path] and path.read_text() == "old"


def test_the_new_file_has_its_name_only_once_it_is_complete(path):
    with replace_file(path) as part:
        assert part.name == path.name  # for writers that choose the format by the suffix
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_of_the_old_file_keeps_it(path):
    with path.open() as reader:
        with replace_file(path) as part:
            part.write_text("new")
        assert reader.read() == "old"


def test_the_file_and_its_new_name_are_synced_before_and_after_the_rename(path, monkeypatch):
    calls = []

    def fsync(descriptor):
        calls.append(os.fstat(descriptor).st_ino)

    def replace(source, target):
        calls.append("rename")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(atomic.os, "fsync", fsync)
    monkeypatch.setattr(atomic.os, "replace", replace)
    with replace_file(path) as part:
        part.write_text("new")
    assert calls == [path.stat().st_ino, "rename", path.parent.stat().st_ino]


@pytest.mark.parametrize("error", [RuntimeError("other"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_passes(path, error):
    with pytest.raises(type(error)), replace_file(path) as part:
        part.write_text("half")
        part.with_name(".tmp123").write_text("of a library's own")
        raise error
    assert only_the_old(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_and_is_an_output_error(path, monkeypatch, call):
    def fail(*given):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic.os, call, fail)
    message = r"clip \[1\]\.kv could not be written: Input/output error\."
    with pytest.raises(OutputError, match=message) as refusal, replace_file(path) as part:
        part.write_text("new")
    assert isinstance(refusal.value, TieredKVError)
    assert isinstance(refusal.value, OSError)
    assert only_the_old(path)


def test_more_than_is_free_is_refused_before_writing(path, monkeypatch):
    usage = atomic.shutil.disk_usage(path.parent)._replace(free=2**20)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
    message = r"needs 2 MiB of disk, 1 MiB free"
    with pytest.raises(OutputError, match=message), replace_file(path, 2**21):
        pytest.fail("writing began")
    assert only_the_old(path)
    with replace_file(path, 2**20) as part:
        part.write_text("fits")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "is a folder: give the name of a file"),
        ("missing/clip.kv", "there is no folder .*missing"),
        ("/dev/null", "is not a file"),
        ("x" * 250, "could not be written: File name too long"),
        ("half \ud83d.kv", "is not a file name"),
        ("null \0.kv", "is not a file name"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused(tmp_path, name, message):
    with pytest.raises(OutputError, match=message) as refusal:
        check_target(tmp_path / name)
    str(refusal.value).encode()  # can be printed
    with pytest.raises(OutputError, match=message), replace_file(tmp_path / name):
        pytest.fail("writing began")
    assert not list(tmp_path.iterdir())


def test_checking_a_target_changes_nothing(path):
    check_target(path)
    assert only_the_old(path)
    check_target(path.with_name("new.kv"))
    assert only_the_old(path)


@pytest.mark.subprocess
def test_leftovers_of_dead_writers_of_this_file_are_removed(path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f"{path.name}.{dead.pid}-3.part", f"{path.name}.{dead.pid}.part", f"{path.name}.{os.getpid()}-0.part"]
    kept = [f"{path.name}.{os.getppid()}-0.part", f"other.kv.{dead.pid}-0.part", f"{path.name}.mine.part"]
    for name in [*names, *kept]:
        path.with_name(name).mkdir()
        (path.with_name(name) / ".tmpAbc").touch()
    with replace_file(path) as part:
        part.write_text("new")
    assert sorted(found.name for found in path.parent.iterdir()) == sorted([*kept, path.name])


def test_two_threads_may_write_one_file(path):
    """Neither takes the other's temporary file for a leftover."""
    started, other_done = threading.Event(), threading.Event()

    def write():
        with replace_file(path) as part:
            part.write_text("slow")
            started.set()
            other_done.wait(60)

    slow = threading.Thread(target=write)
    slow.start()
    started.wait(60)
    with replace_file(path) as part:
        part.write_text("fast")
    assert path.read_text() == "fast"
    other_done.set()
    slow.join()
    assert path.read_text() == "slow"
    assert list(path.parent.iterdir()) == [path]
