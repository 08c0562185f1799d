"""`/v1/files`: OpenAI's files, and what a page needs to show them."""

from __future__ import annotations

import asyncio
import os
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from tieredkv.errors import VideoError
from tieredkv.serve.errors import ApiError
from tieredkv.serve.media.entry import Entry
from tieredkv.serve.media.identity import open_known
from tieredkv.serve.media.kinds import HEAD, OTHER, content_type
from tieredkv.serve.media.library import Library
from tieredkv.serve.media.store import Store
from tieredkv.serve.media.thumbnails import WIDEST, Thumbnails
from tieredkv.serve.media.uploads import receive

router = APIRouter()

_FORM_BYTES = 2**20
"""More than a form takes around its file."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, max-age=3600",
}
"""Of a stranger's file: a browser shows it as what we say it is, runs nothing in it, and gives it to no other page."""


@router.post("/v1/files")
async def upload(request: Request) -> dict[str, Any]:
    """Receive a film, to disk as it arrives."""
    store = _library(request).store
    stated = request.headers.get("Content-Length", "")
    if stated.isdecimal() and int(stated[:20]) > store.film_bytes + _FORM_BYTES:
        most = store.film_bytes / 2**30
        raise ApiError(413, f"the upload is larger than the {most:g} GiB that a film may have.", code="file_too_large")
    try:
        kind = request.headers.get("Content-Type", "")
        return _shown(await receive(kind, request.stream(), store, _owner(request)))
    except ClientDisconnect:
        raise ApiError(499, "the upload was cut short: send it again.", code="cut_short") from None


@router.get("/v1/files")
async def files(
    request: Request,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The uploads of this client."""
    found = [each for each in _library(request).store.uploads(_owner(request)) if purpose in (None, each.purpose)]
    if order == "asc":
        found.reverse()
    if after is not None:
        ids = [each.id for each in found]
        found = found[ids.index(after) + 1 :] if after in ids else []
    shown = [_shown(each) for each in found[:limit]]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **ends, "has_more": len(found) > limit}


@router.get("/v1/files/{id}")
async def one_file(request: Request, id: str) -> dict[str, Any]:
    """One upload. Whoever has its id, which cannot be guessed, may use it."""
    return _shown(_library(request).upload(id))


@router.delete("/v1/files/{id}")
async def delete(request: Request, id: str) -> dict[str, Any]:
    """Remove one upload of this client."""
    library = _library(request)
    entry = library.upload(id)
    if entry.owner != _owner(request) and not entry.permanent:
        raise ApiError(403, f"{entry.name} was uploaded with another API key: delete it with that.", code="not_owner")
    await asyncio.to_thread(library.store.delete, entry)
    return {"id": id, "object": "file", "deleted": True}


@router.api_route("/v1/files/{id}/content", methods=["GET", "HEAD"])
async def content(request: Request, id: str) -> Response:
    """The film itself, or the part of it that `Range` names."""
    library = _library(request)
    entry = library.upload(id)
    kind = await asyncio.to_thread(_kind, entry)
    return _Kept(library.store, entry, kind)


@router.get("/v1/files/{id}/frame")
async def frame(
    request: Request,
    id: str,
    time: Annotated[float, Query(ge=0, le=1e7, allow_inf_nan=False)] = 0.0,
    width: Annotated[int, Query(ge=16, le=WIDEST)] = 320,
) -> Response:
    """What the film shows at a time, as JPEG."""
    library = _library(request)
    entry = library.upload(id)
    kind = await asyncio.to_thread(_kind, entry)
    film = library.film_of(entry, "image" if kind.startswith("image/") else "video")
    with library.pin(film):
        picture = await _thumbnails(request).jpeg(film, time, width)
    return Response(picture, media_type="image/jpeg", headers=_HEADERS)


class _Kept(FileResponse):
    """A film of the store, which does not leave for another one while it is sent."""

    def __init__(self, store: Store, entry: Entry, kind: str) -> None:
        place: Any = "attachment" if kind == OTHER else "inline"
        super().__init__(
            entry.path, headers=_HEADERS, media_type=kind, filename=entry.name, content_disposition_type=place
        )
        self._store, self._entry = store, entry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._store.reading(self._entry):
            await super().__call__(scope, receive, send)


def _kind(entry: Entry) -> str:
    try:
        descriptor = open_known(entry.path, entry.name, entry.identity)
    except VideoError:
        raise ApiError(404, f"{entry.name} has left for newer films: upload it again.", code="no_such_file") from None
    try:
        return content_type(os.pread(descriptor, HEAD, 0))
    finally:
        os.close(descriptor)


def _shown(entry: Entry) -> dict[str, Any]:
    """In OpenAI's words."""
    return {
        "id": entry.id,
        "object": "file",
        "bytes": entry.bytes,
        "created_at": entry.created,
        "filename": entry.name,
        "purpose": entry.purpose,
        "status": "processed",
    }


def _library(request: Request) -> Library:
    return request.app.state.library


def _thumbnails(request: Request) -> Thumbnails:
    state = request.app.state
    if not hasattr(state, "thumbnails"):
        state.thumbnails = Thumbnails(state.library)
    return state.thumbnails


def _owner(request: Request) -> str:
    """Whose uploads they are: a key's. Without keys everybody is one client: an address says little of who it is."""
    return getattr(request.state, "client", "") if request.app.state.settings.api_keys else ""
