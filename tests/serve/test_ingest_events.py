"""`POST /v1/files/{id}/ingest`: a film is read before anybody asks about it."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from serve_examples import events

from tieredkv.errors import BudgetError
from tieredkv.serve.asked import Progress
from tieredkv.serve.errors import ApiError
from tieredkv.video.sampling import Sampling

URL = "/v1/files/file-1/ingest"


async def test_progress_and_then_that_it_is_ready(client, engine):
    reply = await client.post(URL, json={"media_io_kwargs": {"video": {"fps": 0.5}}})
    assert events(reply.text) == [
        {"stage": "ingest", "done": 400, "total": 960, "seconds": 0.0},
        {"reused": False, "tokens": 960, "seconds": 16.0},
    ]
    assert [line for line in reply.text.splitlines() if line.startswith("event")] == ["event: progress", "event: ready"]
    (asked,) = engine.prepared
    assert asked.media[0].film.name == "file-1"
    assert asked.media[0].sampling == Sampling(fps=0.5)


async def test_no_body_means_the_servers_defaults(client, engine):
    assert (await client.post(URL)).status_code == 200
    assert engine.prepared[0].media[0].sampling == Sampling()


async def test_a_film_that_is_not_there_has_its_status(client):
    assert (await client.post("/v1/files/file-missing/ingest")).status_code == 404


async def test_a_full_queue_has_its_status(client, engine):
    engine.preparation = [ApiError(429, "the queue is full: try again in 5 s.", code="queue_full", retry_after=5)]
    assert (await client.post(URL)).status_code == 429


async def test_an_error_on_the_way_is_an_event(client, engine):
    engine.preparation = [Progress("ingest", 1, 2), BudgetError("needs 5 GiB, 3 GiB free: lower fps.")]
    reply = await client.post(URL)
    assert "event: error" in reply.text
    assert events(reply.text)[-1]["error"]["message"] == "needs 5 GiB, 3 GiB free: lower fps."


async def test_unknown_fields_are_refused(client):
    reply = await client.post(URL, json={"fps": 1})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "fps")
