"""One file on disk holding tensors and a manifest: written atomically, mapped when read, refused when damaged.

The file is a safetensors file, which other programs can open. It has three parts, without gaps:

- the header: its length, and JSON with the manifest, each tensor's dtype, shape and offsets, and the CRC-32 of each
  tensor's bytes;
- the tensors;
- the header checksum, stored as one more tensor: the CRC-32 of all bytes of the header.

So every byte is covered: the header must match its checksum, each tensor its own, and the header says where the file
ends. A change within 32 consecutive bits is always noticed, any other with probability 1 - 2**-32. The checksums
protect against accidents, not against forgery.
"""

from __future__ import annotations

import json
import mmap
import os
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tieredkv.environment.ambient import settled
from tieredkv.errors import SessionError
from tieredkv.progress import Progress
from tieredkv.storage.atomic import replace_file
from tieredkv.storage.header import FORMAT_VERSION, HEADER_CHECKSUM, KEY, opened, read_header, session_errors

_PIECE = 64 * 2**20
"""Bytes to check at a time."""
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def write(
    path: str | Path,
    manifest: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Write `manifest` (anything JSON holds) and `tensors` (contiguous, on the CPU) to `path`; returns the file's size
    and the checksum of its header.

    The file is written whole or not at all (`storage.atomic`), and a file that is replaced stays valid where it is
    mapped. Tensors are not copied, and must not change meanwhile. `progress` is called with bytes written and their
    total; an exception that it raises cancels the writing.

    Raises `SessionError` for a full disk, a missing folder, or anything but a file at `path`.
    """
    path = Path(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values() or tensor.device.type != "cpu" or not tensor.is_contiguous():
            kind = f"{tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
            raise ValueError(f"tensor {name!r} is {kind}: give contiguous CPU tensors of a plain dtype.")
    if taken := tensors.keys() & {HEADER_CHECKSUM, "__metadata__"}:
        raise ValueError(f"a tensor cannot be named {taken.pop()!r}: the file format uses that name.")
    json.dumps(manifest)  # raises for what JSON cannot hold, before the disk is touched
    size = sum(tensor.nbytes for tensor in tensors.values())
    with _session_errors(path), replace_file(path, size) as part:
        checksums = {name: zlib.crc32(_bytes(tensor)) for name, tensor in tensors.items()}
        metadata = {"format_version": FORMAT_VERSION, "manifest": manifest, "checksums": checksums}
        content = tensors | {HEADER_CHECKSUM: torch.zeros(1, dtype=torch.int64, device="cpu")}
        with ThreadPoolExecutor(1) as pool:
            saving = pool.submit(save_file, content, part, {KEY: json.dumps(metadata)})
            while progress and not wait([saving], timeout=0.1).done:
                progress(min(_written(part.parent), size), size)
            saving.result()
        written = _write_header_checksum(part)
        part.chmod(part.parent.stat().st_mode & 0o666)  # `save_file` lets only the owner read it, whatever the umask
    if progress:
        progress(size, size)
    return written


def read(path: str | Path) -> Stored:
    """Open a file that `write` wrote. Only its header is read and checked; the tensors are mapped.

    Raises `SessionError` for a file that is missing, from another program, in a newer format, cut short, or damaged in
    its header.
    """
    with opened(path) as (descriptor, mapped):
        return Stored(Path(path), os.dup(descriptor), mapped)


class Stored:
    """Manifest and tensors of a file, mapped until the last tensor is freed. Returned by `read`.

    The mapping is private: writing into a tensor changes neither the file nor another reader, but does change what
    `tensor` and `verify` of this object see. The file may be replaced meanwhile, but must not be changed in place.
    """

    def __init__(self, path: Path, descriptor: int, mapped: mmap.mmap) -> None:
        """descriptor: the open file; closed when this object is freed."""
        self.path, self._descriptor, self._mapped = path, descriptor, mapped
        weakref.finalize(self, os.close, descriptor)
        self._state = self._state_of_file()
        self.nbytes = len(mapped)
        """Size of the file in bytes."""
        self._header = read_header(path, mapped)
        self.manifest: dict[str, Any] = self._header.manifest
        self.checksum = self._header.checksum
        """CRC-32 of the header, which tells this file from any other."""

    def _state_of_file(self) -> tuple[int, int]:
        state = os.fstat(self._descriptor)
        return state.st_size, state.st_mtime_ns

    def check_unchanged(self) -> None:
        """Raise `SessionError` if the file was changed in place since it was opened: its tensors would change too."""
        if self._state_of_file() != self._state:
            raise SessionError(f"{self.path} was changed while it was in use: load it again, or restore it.")

    @property
    def descriptor(self) -> int:
        """The open file; valid as long as this object."""
        return self._descriptor

    def offset_of(self, tensor: torch.Tensor) -> int:
        """Where the data of a tensor that `tensor` has returned begins in the file."""
        return tensor.data_ptr() - torch.frombuffer(self._mapped, dtype=torch.uint8, count=1).data_ptr()

    @property
    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._header.entries)

    @settled
    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name, mapped: nothing is read before use. Raises `SessionError` for an unknown name."""
        start, stop = self._offsets(name)
        dtype, shape = _DTYPES[self._header.entries[name]["dtype"]], self._header.entries[name]["shape"]
        if start == stop:
            return torch.empty(shape, dtype=dtype, device="cpu")  # torch maps no empty buffer
        count = (stop - start) // dtype.itemsize
        return torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=start).reshape(shape)

    def verify(self, *names: str, keep: bool = True) -> None:
        """Read and check these tensors, by default all. Raises `SessionError`, naming the first damaged one.

        keep: whether what was read may stay in memory; if not, the tensors must not have been changed.
        """
        for name in names or self.names:
            start, stop = self._offsets(name)
            checksum = 0
            for begin in range(start, stop, _PIECE):
                end = min(begin + _PIECE, stop)
                with memoryview(self._mapped) as whole, whole[begin:end] as part:
                    checksum = zlib.crc32(part, checksum)
                if not keep:
                    self._release(begin, end)
            if checksum != self._header.checksums[name]:
                raise SessionError(f"{self.path} is damaged: {name!r} does not match its checksum.")

    def _release(self, start: int, stop: int) -> None:
        """Take the pages that lie between two offsets out of this process's memory, where the system can."""
        first, last = -(-start // mmap.PAGESIZE), stop // mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)

    def _offsets(self, name: str) -> tuple[int, int]:
        """First byte in the file, and the one after the last."""
        if name not in self._header.entries:
            raise SessionError(f"{self.path} holds no tensor {name!r}.")
        start, stop = self._header.entries[name]["data_offsets"]
        return self._header.start + start, self._header.start + stop


def _write_header_checksum(file: Path) -> tuple[int, int]:
    """Fill in the header checksum of an otherwise complete file; returns the file's size and that checksum."""
    with file.open("r+b") as stream:
        prefix = stream.read(8)
        header = stream.read(int.from_bytes(prefix, "little"))
        stream.seek(json.loads(header)[HEADER_CHECKSUM]["data_offsets"][0], os.SEEK_CUR)
        checksum = zlib.crc32(prefix + header)
        stream.write(checksum.to_bytes(8, "little"))
        return os.fstat(stream.fileno()).st_size, checksum


def _bytes(tensor: torch.Tensor) -> Any:
    """The tensor's memory, not copied. Viewed as bytes, as numpy has no bfloat16."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _written(folder: Path) -> int:
    """Bytes written into a folder so far: allocated blocks, as the file has its full length from the start."""
    size = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # renamed since
            size += getattr(file.stat(), "st_blocks", 0) * 512
    return size


@contextmanager
def _session_errors(path: Path) -> Iterator[None]:
    try:
        with session_errors():
            yield
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ")
        raise SessionError(f"{path} could not be written: {reason}.") from error
