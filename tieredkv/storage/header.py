"""The header of a file of tensors: its manifest, and where each tensor is. Read and checked without torch."""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tieredkv.errors import OutputError, SessionError
from tieredkv.storage import atomic

FORMAT_VERSION = 2
KEY = "tieredkv"
HEADER_CHECKSUM = "tieredkv.seal"  # the name on disk


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says, once it matches its checksum."""

    start: int
    """Offset of the first tensor in the file."""
    manifest: dict[str, Any]
    checksums: dict[str, int]
    """CRC-32 of each tensor's bytes, by name."""
    entries: dict[str, dict[str, Any]]
    """dtype, shape and offsets of each tensor, by name."""
    checksum: int
    """CRC-32 of the header's bytes, the tensors' checksums among them."""


def read(path: str | Path) -> Header:
    """The header of a file of tensors. Raises `SessionError` as `tensor_file.read` does."""
    with opened(path) as (_, mapped):
        header = read_header(Path(path), mapped)
        mapped.close()
    return header


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[int, mmap.mmap]]:
    """Yields the descriptor of a file, closed after the block, and its content, mapped for private changes.

    Raises `SessionError` if it is missing, no file, empty or unreadable.
    """
    path = Path(path)
    with session_errors():
        atomic.check_name(path)
    try:
        if not path.exists():
            raise SessionError(f"{path}: no such file.")
        if not path.is_file():
            raise SessionError(f"{path} is not a file.")
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise SessionError(f"{path} is cut short: it is empty.")
            yield file.fileno(), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_header(path: Path, mapped: mmap.mmap) -> Header:
    """The header of a mapped file. Raises `SessionError` for another program's, a newer, a cut or a damaged one."""
    try:
        length = int.from_bytes(mapped[:8], "little")
        start = 8 + length
        if mapped[8:9] not in (b"{", b""):
            raise ValueError
        if start > len(mapped):
            raise SessionError(f"{path} is cut short, or its header is damaged: it has {len(mapped)} bytes.")
        header = json.loads(mapped[8:start])
        metadata = json.loads(header["__metadata__"][KEY])
        version = metadata["format_version"]
        if version > FORMAT_VERSION:
            raise SessionError(f"{path} was written by a newer tieredkv (format {version}): update.")
        end = start + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        if end != len(mapped):
            raise SessionError(f"{path} is cut short, or its header is damaged: {len(mapped)} bytes instead of {end}.")
        offset = start + header[HEADER_CHECKSUM]["data_offsets"][0]
        checksum = int.from_bytes(mapped[offset : offset + 8], "little")
    except SessionError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise SessionError(f"{path} is not a tieredkv file, or its header is damaged.") from None
    if zlib.crc32(mapped[:start]) != checksum:
        raise SessionError(f"{path} is damaged: its header does not match its checksum.")
    checksums = metadata["checksums"]
    return Header(start, metadata["manifest"], checksums, {name: header[name] for name in checksums}, checksum)


def check_target(path: Path) -> None:
    """Raise `SessionError` for a path that `tensor_file.write` could not write to; leaves nothing there."""
    with session_errors():
        atomic.check_target(path)


def check_space(path: Path, nbytes: int) -> None:
    """Raise `SessionError` if the disk has no room for a new file of this many bytes at `path`."""
    with session_errors(), atomic.output_errors(path):
        atomic.check_space(path, nbytes)


@contextmanager
def session_errors() -> Iterator[None]:
    """Turns an `OutputError` into a `SessionError`."""
    try:
        yield
    except OutputError as error:
        raise SessionError(str(error)) from error
