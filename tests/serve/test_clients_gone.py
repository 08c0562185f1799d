"""A client that goes away stops its work at once, and only its own."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
import pytest

pytest.importorskip("fastapi")

from serve_examples import chat
from serve_fakes import eventually

from tieredkv.serve.asked import Piece, Progress

FOREVER = 60.0


def leave(url: str, body: dict, seconds: float = 0.3) -> None:
    """Send a request, and close the connection before it is answered."""
    with contextlib.suppress(httpx.TimeoutException), httpx.Client(timeout=seconds) as client:
        client.post(url, json=body)
        raise AssertionError("the request was answered")


@pytest.mark.threads
@pytest.mark.parametrize("script", [[FOREVER], [Progress("queued"), FOREVER], [Piece("A "), FOREVER]], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_is_stopped(listening, script, stream):
    listening.engine.script = script
    leave(f"{listening.url}/v1/chat/completions", chat(stream=stream))
    assert eventually(lambda: listening.engine.stopped == 1)
    assert eventually(lambda: listening.library.pinned == [])


@pytest.mark.threads
@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_stopped_too_and_not_stored(listening, stream):
    listening.engine.script = [Piece("A "), FOREVER]
    before = len(listening.app.state.conversations)
    body = chat(stream=stream)
    body["input"] = body.pop("messages")
    leave(f"{listening.url}/v1/responses", body)
    assert eventually(lambda: listening.engine.stopped == 1)
    assert len(listening.app.state.conversations) == before


@pytest.mark.threads
def test_an_ingest_is_stopped_too(listening):
    listening.engine.preparation = [Progress("ingest", 1, 2), FOREVER]
    leave(f"{listening.url}/v1/files/file-1/ingest", {})
    assert eventually(lambda: listening.engine.stopped == 1)


@pytest.mark.threads
def test_text_arrives_as_it_is_said(listening):
    listening.engine.script = [Piece("A "), FOREVER]
    url = f"{listening.url}/v1/chat/completions"
    with httpx.Client(timeout=5) as client, client.stream("POST", url, json=chat(stream=True)) as reply:
        for line in reply.iter_lines():
            if '"A "' in line:
                assert listening.engine.closed == 0
                break
        else:
            raise AssertionError("the text did not come")
    assert eventually(lambda: listening.engine.stopped == 1)


@pytest.mark.threads
def test_others_are_answered_meanwhile(listening):
    listening.engine.script = [Piece("A "), 0.5, *listening.engine.script]

    async def ask(client: httpx.AsyncClient) -> str:
        reply = await client.post(f"{listening.url}/v1/chat/completions", json=chat())
        return reply.json()["choices"][0]["message"]["content"]

    async def all_of_them() -> list[str]:
        async with httpx.AsyncClient(timeout=10) as client:
            going = asyncio.create_task(ask(client))
            staying = [asyncio.create_task(ask(client)) for _ in range(3)]
            await asyncio.sleep(0.2)
            going.cancel()
            return await asyncio.gather(*staying)

    assert asyncio.run(all_of_them()) == ["A red circle."] * 3
    assert eventually(lambda: (listening.engine.stopped, listening.engine.closed) == (1, 4))
