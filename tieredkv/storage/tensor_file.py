"""One file on disk holding tensors and a manifest: written atomically, mapped when read, refused when damaged.

The file is a safetensors file, which other programs can open. It has three parts, without gaps:

- the header: its length, and JSON that holds the manifest, each tensor's dtype, shape and place, and the CRC-32 of
  each tensor's bytes;
- the tensors;
- the seal, one more tensor: the CRC-32 of all of the header's bytes.

So each byte is in the header (a change no longer matches the seal), in the seal (it no longer matches the header) or in
a tensor (it no longer matches its checksum), and the header says where the file ends. A change within 32 bits in a row
is always noticed, any other with probability 1 - 2**-32. Against accidents, not against forgery.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import threading
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tieredkv.environment import forking
from tieredkv.environment.ambient import settled
from tieredkv.errors import SessionError
from tieredkv.progress import Progress
from tieredkv.storage.atomic import sync_folder

FORMAT_VERSION = 1

_KEY = "tieredkv"
_SEAL = "tieredkv.seal"
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
_one_writer = threading.Lock()  # two threads that save one path would share a temporary name


def _after_fork() -> None:
    global _one_writer
    _one_writer = threading.Lock()


forking.in_child(_after_fork)


def write(
    path: str | Path,
    manifest: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    progress: Progress | None = None,
) -> int:
    """Writes manifest (anything JSON holds) and tensors (contiguous, on the CPU) to `path`; returns the file's bytes.

    A kill at any moment leaves the old file or the new one: all is written and synced under a temporary name next to
    `path`, then renamed. The file that is replaced stays valid where it is mapped. Tensors are not copied, and must not
    change meanwhile. `progress` is told of bytes written and their total; what it raises undoes the writing.

    A full disk, a missing folder, or anything but a file at `path` is a `SessionError`; the old file is then untouched
    and nothing temporary is left. What a killed writer left for this path is removed by the next.
    """
    path = Path(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values() or tensor.device.type != "cpu" or not tensor.is_contiguous():
            kind = f"{tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
            raise ValueError(f"tensor {name!r} is {kind}: give contiguous CPU tensors of a plain dtype.")
    if taken := tensors.keys() & {_SEAL, "__metadata__"}:
        raise ValueError(f"a tensor cannot be named {taken.pop()!r}: the file format uses that name.")
    json.dumps(manifest)  # what JSON cannot hold is refused before the disk is touched
    size = sum(tensor.nbytes for tensor in tensors.values())
    with _one_writer, _as_session_error(path):
        check_target(path)
        _remove_leftovers(path)
        _check_space(path, size)
        checksums = {name: zlib.crc32(_bytes(tensor)) for name, tensor in tensors.items()}
        about = {"format_version": FORMAT_VERSION, "manifest": manifest, "checksums": checksums}
        # A folder: `save_file` has a temporary file of its own, which would be left under a random name.
        with _part_of(path) as part:
            file = part / "data"
            sealed = tensors | {_SEAL: torch.zeros(1, dtype=torch.int64, device="cpu")}
            with ThreadPoolExecutor(1) as pool:
                saving = pool.submit(save_file, sealed, file, {_KEY: json.dumps(about)})
                while progress and not wait([saving], timeout=0.1).done:
                    progress(min(_written(part), size), size)
                saving.result()
            written = _seal(file)
            file.chmod(part.stat().st_mode & 0o666)  # `save_file` makes it the owner's alone, whatever the umask
            os.replace(file, path)
        sync_folder(path.parent)
    if progress:
        progress(size, size)
    return written


def read(path: str | Path) -> Stored:
    """Opens a file that `write` made. Only its header is read, and checked; the tensors are mapped.

    A missing file, one of another program or of a newer format, and one cut short or with a damaged header is each a
    `SessionError` that says which.
    """
    path = Path(path)
    _check_name(path)
    try:
        if not path.exists():
            raise SessionError(f"{path}: no such file.")
        if not path.is_file():
            raise SessionError(f"{path} is not a file.")
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise SessionError(f"{path} is cut short: it is empty.")
            return Stored(path, os.dup(file.fileno()), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror or error}.") from error


class Stored:
    """Manifest and tensors of a file, mapped; memory is given back with the last tensor. Made by `read`.

    The mapping is private: writing into a tensor changes neither the file nor another reader, but does change what
    `tensor` and `verify` of this object see. The file may be replaced meanwhile, but must not be changed in place.
    """

    def __init__(self, path: Path, descriptor: int, mapped: mmap.mmap) -> None:
        """descriptor: of the open file; closed with this object."""
        self.path, self._descriptor, self._mapped = path, descriptor, mapped
        weakref.finalize(self, os.close, descriptor)
        self._state = self._state_of_file()
        self.nbytes = len(mapped)
        """Bytes of the file."""
        start, header, about = _header(path, mapped)
        self.manifest: dict[str, Any] = about["manifest"]
        self._checksums: dict[str, int] = about["checksums"]
        self._entries = {name: header[name] for name in self._checksums}
        self._start = start

    def _state_of_file(self) -> tuple[int, int]:
        state = os.fstat(self._descriptor)
        return state.st_size, state.st_mtime_ns

    def check_unchanged(self) -> None:
        """Raise `SessionError` if the file was changed in place since it was read: tensors would show it, or crash."""
        if self._state_of_file() != self._state:
            raise SessionError(f"{self.path} was changed while it was in use: load it again, or restore it.")

    @property
    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._entries)

    @settled
    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name, mapped: nothing is read before it is used. An unknown name is a `SessionError`."""
        start, stop = self._place(name)
        dtype, shape = _DTYPES[self._entries[name]["dtype"]], self._entries[name]["shape"]
        if start == stop:
            return torch.empty(shape, dtype=dtype, device="cpu")  # torch maps no empty buffer
        count = (stop - start) // dtype.itemsize
        return torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=start).reshape(shape)

    def verify(self, *names: str) -> None:
        """Reads the tensors of those names, or all of them; a `SessionError` names the first that is damaged."""
        for name in names or self.names:
            start, stop = self._place(name)
            with memoryview(self._mapped) as whole, whole[start:stop] as part:
                if zlib.crc32(part) != self._checksums[name]:
                    raise SessionError(f"{self.path} is damaged: {name!r} does not match its checksum.")

    def _place(self, name: str) -> tuple[int, int]:
        if name not in self._entries:
            raise SessionError(f"{self.path} holds no tensor {name!r}.")
        start, stop = self._entries[name]["data_offsets"]
        return self._start + start, self._start + stop


def _header(path: Path, mapped: mmap.mmap) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Where tensors start, the header's entries, and what is ours in it; trusted only once the seal matches."""
    try:
        length = int.from_bytes(mapped[:8], "little")
        start = 8 + length
        if mapped[8:9] not in (b"{", b""):
            raise ValueError
        if start > len(mapped):
            raise SessionError(f"{path} is cut short, or its header is damaged: it has {len(mapped)} bytes.")
        header = json.loads(mapped[8:start])
        about = json.loads(header["__metadata__"][_KEY])
        version = about["format_version"]
        if version > FORMAT_VERSION:
            raise SessionError(f"{path} was written by a newer tieredkv (format {version}): update.")
        end = start + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        if end != len(mapped):
            raise SessionError(f"{path} is cut short, or its header is damaged: {len(mapped)} bytes instead of {end}.")
        place = start + header[_SEAL]["data_offsets"][0]
        seal = int.from_bytes(mapped[place : place + 8], "little")
    except SessionError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise SessionError(f"{path} is not a file of tieredkv, or its header is damaged.") from None
    if zlib.crc32(mapped[:start]) != seal:
        raise SessionError(f"{path} is damaged: its header does not match its checksum.")
    return start, header, about


def _seal(file: Path) -> int:
    """Writes the header's checksum into the seal and syncs; returns the file's size."""
    with file.open("r+b") as stream:
        prefix = stream.read(8)
        header = stream.read(int.from_bytes(prefix, "little"))
        stream.seek(json.loads(header)[_SEAL]["data_offsets"][0], os.SEEK_CUR)
        stream.write(zlib.crc32(prefix + header).to_bytes(8, "little"))
        stream.flush()
        os.fsync(stream.fileno())
        return os.fstat(stream.fileno()).st_size


def _bytes(tensor: torch.Tensor) -> Any:
    """The tensor's memory, not a copy; by way of bytes, as numpy has no bfloat16."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _written(part: Path) -> int:
    """Bytes on disk below a folder: blocks, as the file has its full length from the start."""
    size = 0
    for file in part.iterdir():
        with suppress(FileNotFoundError):  # renamed since
            size += getattr(file.stat(), "st_blocks", 0) * 512
    return size


def _check_name(path: Path) -> None:
    """Raise `SessionError`, in words that can be printed, for what no file can be called."""
    try:
        named = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise SessionError(f"{str(path)!a} is no file name, as it holds a null or half a character: give another.")


def check_target(path: Path) -> None:
    """Raise `SessionError` for a path that `write` could not write to; leaves nothing there."""
    _check_name(path)
    with _as_session_error(path):
        if path.is_dir():
            raise SessionError(f"{path} is a folder: give the name of a file.")
        if path.exists() and not path.is_file():
            raise SessionError(f"{path} is not a file: give the name of one.")
        if not path.parent.is_dir():
            raise SessionError(f"{path} cannot be written: there is no folder {path.parent}.")
        with _part_of(path):
            pass


@contextmanager
def _part_of(path: Path) -> Iterator[Path]:
    """A folder beside `path` for what is not complete yet; removed, whatever happens."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.mkdir(exist_ok=True)
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_space(path: Path, size: int) -> None:
    """Old and new file exist at once, so all of the new one must fit."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise SessionError(
            f"{path} needs {size / 2**30:.3g} GiB of disk, {free / 2**30:.3g} GiB free in {path.parent}: "
            "free some, or save elsewhere."
        )


def _remove_leftovers(path: Path) -> None:
    """Removes what dead processes left of this path. A process of our own id is dead too: we are not writing yet."""
    for other in path.parent.iterdir():
        match = re.fullmatch(re.escape(path.name) + r"\.(\d{1,9})\.part", other.name)
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            shutil.rmtree(other, ignore_errors=True)


@contextmanager
def _as_session_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SessionError(f"{path} could not be written: {error.strerror or error}.") from error
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while serializing: ").removeprefix("I/O error: ")
        raise SessionError(f"{path} could not be written: {reason}.") from error
