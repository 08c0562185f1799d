"""A file of blocks grows block by block, and a block that changed is refused."""

from __future__ import annotations

import pytest
import torch

from tieredkv.errors import OutputError, SessionError
from tieredkv.storage import block_file


def arenas() -> list[torch.Tensor]:
    """Parts of larger tensors, whose rows are contiguous; one has no bytes."""
    whole = torch.arange(2 * 7 * 3, dtype=torch.float32).reshape(2, 7, 3).to(torch.bfloat16)
    return [whole[:, 2:5], torch.zeros((2, 0, 4), dtype=torch.uint8), torch.arange(4, dtype=torch.int64)[:, None]]


def empty() -> list[torch.Tensor]:
    whole = torch.zeros((2, 9, 3), dtype=torch.bfloat16)
    return [whole[:, 4:7], torch.zeros((2, 0, 4), dtype=torch.uint8), torch.zeros((4, 1), dtype=torch.int64)]


def test_blocks_are_read_into_tensors_as_they_were_written(tmp_path):
    path = tmp_path / "blocks"
    first = block_file.append(path, 0, arenas())
    second = block_file.append(path, first.end, [10 * part for part in arenas()])
    assert path.stat().st_size == second.end == 2 * (18 * 2 + 4 * 8)
    for block, scale in ((second, 10), (first, 1)):
        targets = empty()
        block_file.read(path, block, targets)
        assert all(torch.equal(got, scale * part) for got, part in zip(targets, arenas(), strict=True))


def test_a_block_takes_the_place_of_what_followed_the_last_one(tmp_path):
    path = tmp_path / "blocks"
    first = block_file.append(path, 0, arenas())
    with path.open("ab") as file:
        file.write(b"half a block" * 100)
    second = block_file.append(path, first.end, arenas())
    assert path.stat().st_size == second.end
    block_file.read(path, second, empty())


@pytest.mark.parametrize("place", [0, 30, -1])
def test_a_changed_byte_is_noticed(place, tmp_path):
    path = tmp_path / "blocks"
    block = block_file.append(path, 0, arenas())
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(SessionError, match="blocks is damaged: the block at 0 does not match its checksum"):
        block_file.read(path, block, empty())


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: b""])
def test_a_file_that_was_cut_is_noticed(change, tmp_path):
    path = tmp_path / "blocks"
    block = block_file.append(path, 0, arenas())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SessionError, match="does not match its checksum"):
        block_file.read(path, block, empty())
    path.unlink()
    with pytest.raises(SessionError, match="cannot be read: No such file"):
        block_file.read(path, block, empty())


def test_a_disk_that_is_full_gives_back_what_was_written(tmp_path, monkeypatch):
    path, write = tmp_path / "blocks", block_file._write
    first = block_file.append(path, 0, arenas())

    def full(file, part):
        write(file, part)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(block_file, "_write", full)
    with pytest.raises(OutputError, match="blocks could not be written: No space left"):
        block_file.append(path, first.end, arenas())
    assert path.stat().st_size == first.end


def test_a_write_in_parts_is_completed(tmp_path, monkeypatch):
    path = tmp_path / "blocks"

    class Short:
        def __init__(self, file):
            self.file = file

        def write(self, part):
            return self.file.write(part[:3])

    write = block_file._write
    monkeypatch.setattr(block_file, "_write", lambda file, part: write(Short(file), part))
    block_file.read(path, block_file.append(path, 0, arenas()), empty())
