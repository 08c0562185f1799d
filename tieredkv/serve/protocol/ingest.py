"""`POST /v1/files/{id}/ingest`: read a film before anybody asks about it. Ours; the page does so after an upload."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from tieredkv.serve.asked import Asked, Progress, Ready, Shown
from tieredkv.serve.protocol import events
from tieredkv.serve.protocol.chat import streamed
from tieredkv.serve.protocol.errors import failed
from tieredkv.serve.protocol.parts import Kind, Reference
from tieredkv.serve.protocol.question import client_of, closing, find_film
from tieredkv.serve.protocol.reading import Reading
from tieredkv.serve.protocol.sampling import read_kwargs, sampling_of

router = APIRouter()


class IngestRequest(BaseModel):
    """What decides the cache of the film: it serves questions that say the same."""

    model_config = ConfigDict(extra="forbid")

    media_io_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    system: str | None = None
    kind: Kind = "video"


@router.post("/v1/files/{name}/ingest")
async def ingest(name: str, request: Request, asked: IngestRequest | None = None) -> Response:
    """Events `progress`, and then `ready` or `error`."""
    asked = asked or IngestRequest()
    fields = read_kwargs(asked.media_io_kwargs, asked.mm_processor_kwargs)
    reference = Reference(asked.kind, name, None, "id")
    reading = Reading(_prepare(request, reference, fields, asked.system))
    return await streamed(reading, request, lambda first: _chunks(reading, first))


async def _prepare(
    request: Request, reference: Reference, fields: dict[str, Any], system: str | None
) -> AsyncGenerator[Progress | Ready, None]:
    state = request.app.state
    with ExitStack() as pins:
        client = client_of(request)
        film = await find_film(state, reference, client, pins)
        shown = Shown(film, sampling_of(film.kind, fields, state.settings))
        asked = Asked((shown,), "", system=system, client=client)
        async with closing(state.engine.prepare(asked)) as course:
            async for event in course:
                yield event


async def _chunks(reading: Reading[Any], first: Any) -> AsyncGenerator[bytes, None]:
    event = first
    try:
        while not isinstance(event, Ready):
            if isinstance(event, Progress):
                yield events.data(events.progress_of(event), "progress")
            else:
                yield events.progress_comment(None)
            event = await reading.next(events.QUIET_S)
        yield events.data({"reused": event.reused, "tokens": event.tokens, "seconds": event.seconds}, "ready")
    except Exception as error:  # noqa: BLE001  the status is sent already: the client finds the error in the stream
        yield events.data(failed(error).body(), "error")
