"""A file that only grows: blocks of tensors, one after another, each with a checksum.

The list of blocks is kept elsewhere, in a file that is replaced whole: what follows the last block of that list is what
an interrupted write has left, and the next one overwrites it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch

from tieredkv.errors import SessionError
from tieredkv.storage.atomic import output_errors


@dataclass(frozen=True, slots=True)
class Block:
    """Where a block lies in the file."""

    offset: int
    nbytes: int
    checksum: int
    """CRC-32."""

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.offset + self.nbytes


def append(path: Path, end: int, tensors: Iterable[torch.Tensor]) -> Block:
    """Write tensors `(K, ...)` on the CPU at `end`, and sync; what the file held there is lost.

    Each row of a tensor must be contiguous. Nothing is copied, and nothing may change meanwhile. Raises `OutputError`;
    the blocks before are then as they were.
    """
    checksum, nbytes = 0, 0
    with output_errors(path), path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
        file.truncate(end)
        file.seek(end)
        try:
            for part in _rows(tensors):
                checksum = zlib.crc32(part, checksum)
                nbytes += _write(file, part)
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)  # a full disk is needed for the session file
            raise
    return Block(end, nbytes, checksum)


def read(path: Path, block: Block, tensors: Iterable[torch.Tensor]) -> None:
    """Fill tensors, of the sizes that `append` wrote, with a block.

    Raises `SessionError` if the file is too short, or the block does not match its checksum.
    """
    checksum, nbytes = 0, 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(block.offset)
            for part in _rows(tensors):
                nbytes += _fill(file, part)
                checksum = zlib.crc32(part, checksum)
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror or error}.") from None
    if (nbytes, checksum) != (block.nbytes, block.checksum):
        raise SessionError(f"{path} is damaged: the block at {block.offset:,} does not match its checksum.")


def _write(file: FileIO, part: memoryview) -> int:
    """Write all of `part`; returns its length."""
    written = 0
    while written < len(part):
        written += file.write(part[written:])
    return written


def _fill(file: FileIO, part: memoryview) -> int:
    """Read until `part` is full or the file ends."""
    filled = 0
    while filled < len(part) and (count := file.readinto(part[filled:])):
        filled += count
    return filled


def _rows(tensors: Iterable[torch.Tensor]) -> Iterator[memoryview]:
    """The bytes of each tensor's rows."""
    for tensor in tensors:
        for row in tensor:
            if row.numel():
                yield memoryview(row.view(-1).view(torch.uint8).numpy())
