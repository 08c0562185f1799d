"""One at a time works in a folder."""

from __future__ import annotations

import os

import pytest

from tieredkv.errors import SessionError
from tieredkv.storage.locked_folder import LockedFolder


def test_a_second_one_is_refused_until_the_first_is_closed(tmp_path):
    path = tmp_path / "folder"
    first = LockedFolder(path, ["file"])
    with pytest.raises(SessionError, match="folder is in use by another process: wait until it ends"):
        LockedFolder(path, ["file"])
    first.close()
    second = LockedFolder(path, ["file"])
    first.close()
    with pytest.raises(SessionError):
        LockedFolder(path, ["file"])
    second.close()


def test_a_removed_folder_can_be_made_again(tmp_path):
    path = tmp_path / "folder"
    folder = LockedFolder(path, ["file"])
    (path / "file").write_text("content")
    assert not folder.is_empty()
    folder.remove()
    folder.remove()
    assert not path.exists()
    again = LockedFolder(path, ["file"])
    assert again.is_empty()
    again.remove()


def test_the_lock_of_a_folder_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    """Another process removes the folder between the opening of its lock and the locking."""
    path, opening, other = tmp_path / "folder", os.open, [LockedFolder(tmp_path / "folder", ["file"])]

    def opened(name, *args):
        descriptor = opening(name, *args)
        if other:
            other.pop().remove()
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    folder = LockedFolder(path, ["file"])
    assert (path / "lock").exists()
    folder.remove()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "file could not be written: File exists"),
        ("nowhere/folder", "there is no folder"),
        ("a\0b", "not a file name"),
    ],
)
def test_where_there_can_be_no_folder_it_is_refused(name, reason, tmp_path):
    (tmp_path / "file").write_text("content")
    with pytest.raises(SessionError, match=reason):
        LockedFolder(tmp_path / name, ["file"])


@pytest.mark.parametrize("name", ["thesis.txt", "file.txt", "file.old.part"])
def test_a_folder_with_other_files_is_refused_and_left_as_it_was(name, tmp_path):
    (tmp_path / name).write_text("content")
    with pytest.raises(SessionError, match=f"has {name} in it, so it is not overwritten: give a folder that is new"):
        LockedFolder(tmp_path, ["file"])
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_what_a_killed_process_left_is_no_other_file(tmp_path):
    for name in ("lock", "file", "file.123-0.part"):
        (tmp_path / name).write_text("content")
    LockedFolder(tmp_path, ["file"]).close()
