"""Films by what requests call them: an upload's id, a URL, a name that the client gave."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from tieredkv.errors import VideoError
from tieredkv.serve.asked import Film, Shown
from tieredkv.serve.errors import ApiError
from tieredkv.serve.media.entry import Entry
from tieredkv.serve.media.fetch import Fetcher
from tieredkv.serve.media.folder import Folder
from tieredkv.serve.media.guarded import GuardedPicture, GuardedVideo, guarded
from tieredkv.serve.media.identity import Identity
from tieredkv.serve.media.inline import inline
from tieredkv.serve.media.limits import Limits
from tieredkv.serve.media.store import Store
from tieredkv.serve.media.threads import stoppable
from tieredkv.serve.settings import Settings

Kind = Literal["video", "image"]
_MOST_NAMES = 10_000
"""Names of clients, and files outside the store, that are remembered."""
_LONGEST_NAME = 256
"""Characters of a client's name for a film."""


class Library:
    """All films that requests may name. On the event loop, except where it says otherwise."""

    def __init__(self, settings: Settings, limits: Limits | None = None) -> None:
        self.limits = limits or Limits(seconds=3600.0 * settings.video_hours)
        self.store = Store(settings.upload_gb, settings.uploads_gb)
        self.fetcher = Fetcher(self.store, settings.hosts, settings.any_host)
        self._folder = Folder(settings.videos)
        self._inline: OrderedDict[str, str] = OrderedDict()
        """Ids in the store, by the hash of the URL."""
        self._identities: OrderedDict[Path, Identity] = OrderedDict()
        self._names: OrderedDict[tuple[str, str], Film] = OrderedDict()

    async def open(self) -> None:
        """Make the folder of uploads; what servers that were killed left of theirs is removed. Raises `OSError`."""
        await asyncio.to_thread(self.store.open)

    async def close(self) -> None:
        """Forget and remove all films. May be called twice."""
        await asyncio.to_thread(self.store.close)

    async def film(self, *, url: str | None, uuid: str | None = None, kind: Kind = "video", client: str = "") -> Film:
        """The film that a request names; a file of this machine, hashed. Raises `ApiError` or `VideoError`.

        url: http(s), `file:` or `data:`, or the id of an upload. uuid: the name by which `client` calls these bytes
        from now on; without a url, what it called by that name last.
        """
        if uuid is not None and not 0 < len(uuid) <= _LONGEST_NAME:
            raise ApiError(400, f"uuid must have 1 to {_LONGEST_NAME} characters.", code="invalid_uuid", param="uuid")
        if url is None:
            return self._named(uuid, kind, client)
        film = await self._film(url, kind, uuid, client)
        if uuid is not None:
            self._names[client, uuid] = film
            _trim(self._names)
        return film

    def source(self, shown: Shown) -> GuardedVideo | GuardedPicture:
        """A film that `film` returned, for `VideoSession.ingest`, decoded in another process. For any thread. Raises
        `VideoError` if it was removed since."""
        return guarded(shown, self.identity(shown.film), self.limits)

    def identity(self, film: Film) -> Identity:
        """Of the file whose hash the film states. Raises `VideoError` if it was removed."""
        identity = self._identities.get(film.path)
        if identity is None:
            raise VideoError(f"{film.name}: the server has removed this film: give it again.")
        return identity

    def pin(self, film: Film) -> AbstractContextManager[None]:
        """While the block runs, the film is not removed. For any thread."""
        return self.store.pinned(film.path)

    def add(self, path: Path, name: str) -> Film:
        """Put a file of the server's owner among the uploads of every client, for good. Blocks. Raises `ApiError`."""
        with self.store.writing(name) as writer:
            with path.open("rb") as file:
                while block := file.read(2**20):
                    writer.write(block)
            return self.film_of(writer.keep(permanent=True), "video")

    def film_of(self, entry: Entry, kind: Kind) -> Film:
        """A film of the store."""
        self._know(entry.path, entry.identity)
        return Film(entry.path, entry.sha256, entry.name, kind)

    async def _film(self, url: str, kind: Kind, uuid: str | None, client: str) -> Film:
        scheme = url[: url.find(":")].lower() if ":" in url[:16] else ""
        if scheme == "file":
            return await self._of_folder(url, kind)
        if scheme == "data":
            return await self._of_request(url, kind)
        if scheme in ("http", "https"):
            known = None if uuid is None else self._names.get((client, uuid))
            if known is not None and known.path.exists():
                return Film(known.path, known.sha256, known.name, kind)
            return self.film_of(await self.fetcher.fetch(url), kind)
        if url.startswith("file-"):
            return self.film_of(self.upload(url), kind)
        raise ApiError(
            400,
            "this URL is no film's: give an http(s), file: or data: URL, or the id of an upload (file-...).",
            code="invalid_url",
            param="url",
        )

    def upload(self, id: str) -> Entry:
        """The upload with this id. Raises `ApiError`."""
        entry = self.store.find(id)
        if entry is None or not entry.listed:
            raise ApiError(
                404,
                f"there is no upload {id[:80]!r}: it may have left for newer ones, so upload it again.",
                code="no_such_file",
                param="url",
            )
        return entry

    async def _of_folder(self, url: str, kind: Kind) -> Film:
        path, name = await asyncio.to_thread(self._folder.find, url)
        stop = threading.Event()
        sha256, identity = await stoppable(stop, lambda: self._folder.examine(path, name, stop))
        self._know(path, identity)
        return Film(path, sha256, name, kind)

    async def _of_request(self, url: str, kind: Kind) -> Film:
        """A conversation repeats its films with every question: each is decoded once."""
        key = await asyncio.to_thread(lambda: hashlib.sha256(url.encode("utf-8", "replace")).hexdigest())
        entry = self.store.find(self._inline.get(key, ""))
        if entry is None:
            stop = threading.Event()
            entry = await stoppable(stop, lambda: inline(url, self.store, stop))
            self._inline[key] = entry.id
            _trim(self._inline)
        return self.film_of(entry, kind)

    def _named(self, uuid: str | None, kind: Kind, client: str) -> Film:
        if uuid is None:
            raise ApiError(400, "a film needs a url, or the uuid of an earlier one.", code="invalid_url", param="url")
        film = self._names.get((client, uuid))
        if film is None or not film.path.exists():
            raise ApiError(404, f"no film is known as {uuid!r}: give its url too.", code="no_such_uuid", param="uuid")
        self._names.move_to_end((client, uuid))
        return Film(film.path, film.sha256, film.name, kind)

    def _know(self, path: Path, identity: Identity) -> None:
        self._identities[path] = identity
        _trim(self._identities)


def _trim(names: OrderedDict[Any, Any]) -> None:
    while len(names) > _MOST_NAMES:
        names.popitem(last=False)
