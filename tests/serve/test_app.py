"""The application: unknown paths, errors, and limits that hold before anything is parsed."""

from __future__ import annotations

import asyncio
import json

import pytest
from fastapi import FastAPI

from tieredkv.errors import VideoError
from tieredkv.serve.errors import ApiError
from tieredkv.serve.json_limits import MOST_DEPTH, MOST_MARKS, MOST_NODES, TOGETHER
from tieredkv.serve.settings import Settings


@pytest.fixture
def settings() -> Settings:
    return Settings(body_mb=1.0)


@pytest.fixture
def app(app: FastAPI) -> FastAPI:
    """With a route that takes any JSON, and others that fail."""

    @app.post("/echo")
    async def echo(value: dict) -> dict:
        return value

    @app.get("/api-error")
    async def refused() -> None:
        raise ApiError(429, "the queue is full: try again in 3 s.", code="queue_full", retry_after=3)

    @app.get("/film-error")
    async def film() -> None:
        raise VideoError("film.mp4: not a video.")

    @app.get("/bug")
    async def bug() -> None:
        raise RuntimeError("secret of the server")

    return app


async def test_models_lists_the_one_that_is_served(client):
    reply = (await client.get("/v1/models")).json()
    assert reply["object"] == "list"
    assert [model["id"] for model in reply["data"]] == ["fake/model"]
    assert (await client.get("/v1/models/fake/model")).json() == reply["data"][0]


async def test_another_model_is_not_found_and_the_message_names_the_one_there_is(client):
    reply = await client.get("/v1/models/gpt-4o")
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    assert "fake/model" in reply.json()["error"]["message"]


async def test_an_unknown_path_is_an_error_in_openais_shape(client):
    reply = await client.get("/v1/nothing")
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "/v1/nothing" in error["message"]


async def test_a_wrong_method_says_which_are_right(client):
    reply = await client.delete("/v1/models")
    assert reply.status_code == 405
    assert "use GET" in reply.json()["error"]["message"]


async def test_refusals_carry_their_status_code_and_when_to_retry(client):
    reply = await client.get("/api-error")
    assert reply.status_code == 429
    assert reply.headers["Retry-After"] == "3"
    assert reply.json()["error"] == {
        "message": "the queue is full: try again in 3 s.",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }


async def test_errors_that_users_can_fix_are_bad_requests_with_their_sentence(client):
    reply = await client.get("/film-error")
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == "film.mp4: not a video."


async def test_an_unexpected_error_tells_nothing_of_the_server(client):
    reply = await client.get("/bug")
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"
    assert "secret" not in reply.text
    assert reply.headers["Connection"] == "close"  # as uvicorn does: clients must not use it again


async def test_what_is_not_json_is_said_in_a_sentence(client):
    reply = await client.post("/echo", content=b'{"a": ', headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert "not JSON" in reply.json()["error"]["message"]


async def test_a_body_of_another_type_is_said_in_a_sentence(client):
    reply = await client.post("/echo", content=b"a=1", headers={"Content-Type": "text/plain"})
    assert reply.status_code == 415
    assert "Content-Type" in reply.json()["error"]["message"]


async def test_a_body_over_the_limit_is_refused_by_its_stated_length(client):
    reply = await client.post("/echo", json={"a": "x" * 2**20})
    assert reply.status_code == 413
    assert "1 MiB" in reply.json()["error"]["message"]


async def test_a_body_over_the_limit_is_refused_without_a_stated_length(client):
    async def chunks():
        yield b'{"a": "'
        for _ in range(20):
            yield b"x" * 2**16
        raise AssertionError("the whole body was read")

    reply = await client.post("/echo", content=chunks(), headers={"Content-Type": "application/json"})
    assert reply.status_code == 413


@pytest.mark.parametrize(("depth", "status"), [(MOST_DEPTH - 1, 200), (MOST_DEPTH, 400), (50_000, 400)])
async def test_nesting_is_limited(client, depth, status):
    body = '{"a": ' + "[" * depth + "]" * depth + "}"
    reply = await client.post("/echo", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == status


async def test_brackets_in_texts_do_not_count(client):
    value = {"a": "[" * 1000 + '"\\' + "{" * 1000}
    assert (await client.post("/echo", json=value)).json() == value


async def test_the_number_of_values_is_limited(client):
    body = json.dumps({"a": [[] for _ in range(MOST_NODES)]})
    assert await is_refused_for_its_values(client, body)


@pytest.mark.parametrize("value", ["1", '""'])
async def test_small_values_are_limited_before_they_are_parsed(client, value):
    assert await is_refused_for_its_values(client, f'{{"a": [{",".join([value] * (MOST_MARKS // len(value)))}]}}')


async def is_refused_for_its_values(client, body):
    reply = await client.post("/echo", content=body, headers={"Content-Type": "application/json"})
    return (reply.status_code, reply.json().get("error", {}).get("code")) == (400, "too_many_values")


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": [-Infinity]}', '{"a": "\\ud800"}', '{"a": "\\udfff\\ud800"}'])
async def test_what_could_not_be_written_out_again_is_refused(client, text):
    reply = await client.post("/echo", content=text, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_json")


async def test_half_a_character_in_raw_bytes_is_refused(client):
    reply = await client.post("/echo", content=b'{"a": "\xed\xa0\x80"}', headers={"Content-Type": "application/json"})
    assert reply.status_code == 400


@pytest.mark.parametrize(
    "text", ['{"a": "NaN Infinity"}', '{"a": "\\ud83d\\ude00"}', '{"a": "\\\\ud800"}', '{"a": "\ud55c"}']
)
async def test_texts_that_only_look_like_it_pass(client, text):
    reply = await client.post("/echo", content=text.encode(), headers={"Content-Type": "application/json"})
    assert reply.json() == json.loads(text)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
async def test_other_encodings_hide_nothing(client, encoding):
    body = ('{"a": ' + "[" * 50_000).encode(encoding)
    reply = await client.post("/echo", content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "bad_json")


@pytest.mark.parametrize("body", [b'{"a": \xff}', b'{"a": ' + b"9" * 10_000 + b"}", b"[" * 10, b"nul", b""])
async def test_what_no_parser_takes_is_a_bad_request(client, body):
    reply = await client.post("/echo", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].endswith(".")


async def test_all_bodies_together_are_limited_and_forgotten_when_they_are_answered(app, client):
    large = {"a": "x" * (2**20 - 100)}
    waiting = asyncio.Event()
    arrived = []

    @app.post("/wait")
    async def wait(value: dict) -> dict:
        arrived.append(value)
        await waiting.wait()
        return {}

    held = [asyncio.create_task(client.post("/wait", json=large)) for _ in range(TOGETHER)]
    async with asyncio.timeout(60):
        while len(arrived) < TOGETHER:
            await asyncio.sleep(0.01)
    refused = await client.post("/echo", json=large)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "5")
    waiting.set()
    assert {reply.status_code for reply in await asyncio.gather(*held)} == {200}
    assert (await client.post("/echo", json=large)).status_code == 200
