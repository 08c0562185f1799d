"""Temporary files where the system cannot open one without a name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tieredkv.memory import temporary_file
from tieredkv.memory.temporary_file import TemporaryFile


@pytest.fixture
def named(monkeypatch):
    """Files have names, which the system lets them lose."""
    monkeypatch.setattr(temporary_file, "_nameless", lambda folder: -1)


@pytest.fixture
def undeletable(named, monkeypatch):
    """Open files keep their names."""
    unlink, open_files = Path.unlink, set()

    def refuse(path, **options):
        if path in open_files:
            unlink(path, **options)
        else:
            open_files.add(path)
            raise PermissionError(13, "in use")

    monkeypatch.setattr(Path, "unlink", refuse)


def test_a_name_is_removed_at_once(tmp_path, named):
    file = TemporaryFile(tmp_path)
    assert not list(tmp_path.iterdir())
    os.pwrite(file.descriptor, b"x", 0)
    assert os.pread(file.descriptor, 1, 0) == b"x"
    file.close()


def test_a_name_that_stays_is_removed_by_close(tmp_path, undeletable):
    file = TemporaryFile(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    file.close()
    file.close()
    assert not list(tmp_path.iterdir())


def test_a_name_that_stays_is_removed_with_the_object(tmp_path, undeletable):
    TemporaryFile(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.subprocess
def test_what_a_dead_process_has_left_is_removed_at_the_next_start(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    left = tmp_path / f"tieredkv-{process.pid}-0.records"
    left.write_bytes(b"left")
    other = tmp_path / "tieredkv-notes.txt"
    other.write_text("mine")
    TemporaryFile(tmp_path).close()
    assert list(tmp_path.iterdir()) == [other]


def test_what_a_living_process_has_open_stays(tmp_path, undeletable):
    first, second = TemporaryFile(tmp_path), TemporaryFile(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    second.close()
    os.pwrite(first.descriptor, b"x", 0)
    assert len(list(tmp_path.iterdir())) == 1
    first.close()


def test_a_number_that_was_used_by_another_process_with_our_id_is_skipped(tmp_path, undeletable):
    held = [tmp_path / f"tieredkv-{os.getpid()}-{number}.records" for number in range(1_000)]
    monkey = temporary_file.remove_leftovers
    for path in held:
        path.touch()
    temporary_file.remove_leftovers = lambda folder: None
    try:
        file = TemporaryFile(tmp_path)
    finally:
        temporary_file.remove_leftovers = monkey
    assert len(list(tmp_path.iterdir())) == 1_001
    file.close()


def test_a_folder_that_is_missing_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        TemporaryFile(tmp_path / "nowhere")
