"""What the server says of itself: /health, /v1/tieredkv and /metrics."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_fakes import an_answer

from tieredkv import __version__
from tieredkv.serve.engine.sessions import Tier
from tieredkv.serve.engine.state import Counts
from tieredkv.serve.health import Demo


async def test_health_says_that_requests_are_taken_and_when_no_longer(client, engine):
    reply = await client.get("/health")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok", "waiting": 0, "running": 0})
    engine.state = replace(engine.state, stopping=True, running=1)
    reply = await client.get("/health")
    assert (reply.status_code, reply.json()["status"]) == (503, "stopping")


@pytest.mark.parametrize("path", ["/health", "/", "/page/page.js"])
async def test_who_only_wants_the_headers_gets_them(client, path):
    assert (await client.head(path)).status_code == 200


async def test_what_the_page_needs_to_know(client, app):
    said = (await client.get("/v1/tieredkv")).json()
    assert said["model"] == "fake/model"
    assert (said["toy"], said["demo"], said["key_needed"], said["version"]) == (True, None, False, __version__)
    assert said["limits"]["upload_bytes"] == 4 * 2**30
    app.state.demo = Demo("file-1", ("what ?",))
    assert (await client.get("/v1/tieredkv")).json()["demo"] == {"file_id": "file-1", "questions": ["what ?"]}


async def scraped(client) -> dict[tuple, float]:
    reply = await client.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            found[sample.name, *sorted(sample.labels.values())] = sample.value
    return found


async def test_answers_are_counted(client, app, engine):
    answer = an_answer(
        "a b", prompt_tokens=100, new_tokens=2, ttft_s=0.2, tpot_ms=20.0, moved_bytes=7, disk_read_bytes=5,
        hit_rate=0.75, selected_chunks=40,
    )  # fmt: skip
    for _ in range(2):
        for observer in engine.observers:
            observer(answer.generation)
    found = await scraped(client)
    assert found["tieredkv_prompt_tokens_total",] == 200
    assert found["tieredkv_generated_tokens_total",] == 4
    assert found["tieredkv_link_bytes_total",] == 14
    assert found["tieredkv_disk_read_bytes_total",] == 10
    assert found["tieredkv_selected_chunks_total",] == 80
    assert found["tieredkv_resident_chunks_total",] == 60
    assert found["tieredkv_hit_rate",] == 0.75
    assert found["tieredkv_ttft_seconds_count",] == 2
    assert found["tieredkv_ttft_seconds_sum",] == pytest.approx(0.4)
    assert found["tieredkv_tpot_seconds_sum",] == pytest.approx(0.04)


async def test_the_engines_state_is_shown(client, engine):
    counts = Counts(served=3, refused=2, cancelled=1, open_already=4, loaded=5, ingested=6)
    engine.state = replace(engine.state, waiting=7, running=1, counts=counts, host=Tier(2, 300, 1000))
    found = await scraped(client)
    assert found["tieredkv_queue_length",] == 7
    assert found["tieredkv_running",] == 1
    assert [found["tieredkv_questions_total", end] for end in ("served", "refused", "cancelled")] == [3, 2, 1]
    assert [found["tieredkv_sessions_found_total", where] for where in ("open", "disk", "ingest")] == [4, 5, 6]
    assert found["tieredkv_sessions", "host"] == 2
    assert found["tieredkv_session_bytes", "host"] == 300
    assert found["tieredkv_session_bytes_limit", "host"] == 1000


async def test_requests_are_counted_by_route_and_status(client):
    for path in ("/v1/models/a", "/v1/models/b", "/nothing/1", "/nothing/2"):
        await client.get(path)
    await client.request("BREW", "/v1/models")
    found = await scraped(client)
    assert found["tieredkv_http_requests_total", *sorted(("GET", "/v1/models/{name:path}", "404"))] == 2
    assert found["tieredkv_http_requests_total", *sorted(("GET", "other", "404"))] == 2
    assert found["tieredkv_http_requests_total", *sorted(("other", "/v1/models", "405"))] == 1
