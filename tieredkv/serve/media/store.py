"""Films that the server keeps in a folder of its own, within a quota: uploads, and copies of what requests brought."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from tieredkv.serve.errors import ApiError
from tieredkv.serve.media.entry import Entry
from tieredkv.serve.media.identity import Identity
from tieredkv.serve.media.private import PrivateFolder

_GIB = 2**30
_MOST_ENTRIES = 10_000
"""Files that are kept; the least recently used leave, however small they are."""
_MOST_WRITERS = 16
"""Films that arrive at the same time."""
_SUFFIXES = frozenset(
    (
        ".3gp",
        ".asf",
        ".avi",
        ".bmp",
        ".dv",
        ".flv",
        ".gif",
        ".h264",
        ".hevc",
        ".ivf",
        ".jpeg",
        ".jpg",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".mxf",
        ".nut",
        ".ogg",
        ".ogv",
        ".png",
        ".tif",
        ".tiff",
        ".ts",
        ".webm",
        ".webp",
        ".wmv",
        ".y4m",
    )
)
"""Kept of a name: FFmpeg knows some formats by them."""


class Store:
    """Its methods may be called from any thread. Those that write to disk block."""

    def __init__(self, film_gb: float, all_gb: float) -> None:
        """film_gb, all_gb: most that one film, and all of them, may take."""
        self.film_bytes, self._all_bytes = int(film_gb * _GIB), int(all_gb * _GIB)
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._arriving = self._writers = 0
        self._folder: PrivateFolder | None = None

    def open(self) -> None:
        """Make the folder. Raises `OSError` if there is no place for it."""
        self._folder = PrivateFolder()

    def close(self) -> None:
        """Remove everything. May be called twice."""
        with self._lock:
            self._entries.clear()
            if self._folder is not None:
                self._folder.close()
                self._folder = None

    @property
    def bytes(self) -> int:
        """Of all films, those that are arriving among them."""
        with self._lock:
            return self._arriving + sum(entry.bytes for entry in self._entries.values())

    def find(self, id: str) -> Entry | None:
        """The film with this id, which counts as used now."""
        with self._lock:
            if (entry := self._entries.get(id)) is not None:
                entry.used = time.monotonic()
            return entry

    def uploads(self, owner: str) -> list[Entry]:
        """Those of one client and the permanent ones, the newest first."""
        with self._lock:
            own = [each for each in self._entries.values() if each.listed and (each.permanent or each.owner == owner)]
        return sorted(own, key=lambda each: each.created, reverse=True)

    def delete(self, entry: Entry) -> None:
        """Remove a film. Raises `ApiError` while a question is about it, and for permanent ones."""
        with self._lock:
            if entry.permanent:
                raise ApiError(403, f"{entry.name} belongs to the server and cannot be deleted.", code="not_deletable")
            if entry.pins:
                raise ApiError(409, f"{entry.name} is being asked about: delete it after the answer.", code="in_use")
            self._remove(entry)

    @contextmanager
    def pinned(self, path: Path) -> Iterator[None]:
        """While the block runs, a question is about the film at `path`. Any other path is none of the store's."""
        with self._lock:
            entry = next((each for each in self._entries.values() if each.path == path), None)
            if entry is not None:
                entry.pins += 1
        try:
            yield
        finally:
            if entry is not None:
                with self._lock:
                    entry.pins -= 1
                    entry.used = time.monotonic()

    @contextmanager
    def reading(self, entry: Entry) -> Iterator[None]:
        """While the block runs, the film does not leave for another one."""
        with self._lock:
            entry.readers += 1
        try:
            yield
        finally:
            with self._lock:
                entry.readers -= 1

    @contextmanager
    def writing(self, name: str) -> Iterator[Writer]:
        """A film that arrives. What is not kept at the end of the block is removed. Raises `ApiError`.

        name: for messages and lists; only an ending that is known is used of it.
        """
        with self._lock:
            if self._folder is None:
                raise ApiError(503, "the server is shutting down.", code="shutting_down")
            if self._writers >= _MOST_WRITERS:
                raise ApiError(429, "too many films are arriving: try again.", code="uploads_full", retry_after=5)
            self._writers += 1
            folder = self._folder.path
        try:
            with _Disk(folder):
                writer = Writer(self, folder, name)
            try:
                yield writer
            finally:
                writer.close()
        finally:
            with self._lock:
                self._writers -= 1

    def _remove(self, entry: Entry) -> None:
        self._entries.pop(entry.id, None)
        with suppress(OSError):
            entry.path.unlink()

    def _admit(self, count: int) -> None:
        """Make room for bytes that arrive. Raises `ApiError` if what is in use leaves none."""
        with self._lock:
            self._arriving += count
            self._leave(lambda: self.bytes > self._all_bytes)
            if self.bytes > self._all_bytes:
                raise ApiError(
                    507,
                    f"the films in use take all of the {self._all_bytes / _GIB:g} GiB that the server keeps "
                    "(--uploads-gb): try again after they were answered.",
                    code="storage_full",
                )

    def _leave(self, too_much: Callable[[], bool]) -> None:
        """Remove films that nobody uses, the least recently used first, while there is too much."""
        while too_much():
            idle = [one for one in self._entries.values() if not (one.pins or one.readers or one.permanent)]
            if not idle:
                return
            self._remove(min(idle, key=lambda one: one.used))

    def _arrived(self, writer: Writer, entry: Entry | None) -> None:
        """The bytes of `writer` are those of `entry` from now on; None: they are gone."""
        with self._lock:
            self._arriving -= writer.size
            if entry is not None and self._folder is not None:
                self._entries[entry.id] = entry
                self._leave(lambda: len(self._entries) > _MOST_ENTRIES)


class Writer:
    """A film that arrives, block by block, hashed on its way."""

    def __init__(self, store: Store, folder: Path, name: str) -> None:
        self._store, self.name, self.size = store, name, 0
        suffix = Path(name).suffix.lower()
        self._path = folder / f"{secrets.token_hex(16)}{suffix if suffix in _SUFFIXES else ''}"
        self._file = self._path.open("xb", buffering=0)
        self._digest = hashlib.sha256()
        self._kept = False

    def write(self, block: bytes | memoryview) -> None:
        """Append. Raises `ApiError` if the film is too large, or there is no room for it."""
        count, most = len(block), self._store.film_bytes
        if self.size + count > most:
            raise ApiError(
                413,
                f"{self.name}: larger than the {most / _GIB:g} GiB that a film may have (--upload-gb).",
                code="file_too_large",
            )
        self.size += count
        self._store._admit(count)
        self._digest.update(block)
        view = memoryview(block)
        with _Disk(self._path.parent):
            while view:
                view = view[self._file.write(view) :]

    def keep(
        self,
        owner: str = "",
        purpose: Literal["user_data", "vision"] = "user_data",
        listed: bool = True,
        permanent: bool = False,
    ) -> Entry:
        """The film, complete, in the store. Raises `ApiError` if it is empty."""
        if not self.size:
            raise ApiError(400, f"{self.name}: the file is empty.", code="empty_file", param="file")
        identity = Identity.of(self._file.fileno())
        entry = Entry(
            f"file-{secrets.token_urlsafe(24)}",
            self._path,
            self.name,
            self._digest.hexdigest(),
            identity,
            int(time.time()),
            owner,
            purpose,
            listed,
            permanent,
        )
        self._kept = True
        self._store._arrived(self, entry)
        return entry

    def close(self) -> None:
        """Remove what was not kept."""
        self._file.close()
        if not self._kept:
            with suppress(OSError):
                self._path.unlink()
            self._store._arrived(self, None)


class _Disk:
    """Errors of the disk are one sentence."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self._folder.parent).free
            text = (
                f"the server's disk is full ({free / 2**20:,.0f} MiB free): make room, or start it with another TMPDIR."
            )
            raise ApiError(507, text, code="disk_full") from None
        raise ApiError(507, f"the server cannot write films ({os.strerror(error.errno or 0)}).", code="disk") from None
