"""OpenAI's own client, against a server that listens: nobody here wrote how it reads replies."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai
from serve_examples import FILM, text, user
from serve_fakes import eventually

from tieredkv.serve.asked import Piece, Progress
from tieredkv.serve.errors import ApiError

MESSAGES = [user(FILM, text("What is it?"))]
INPUT = [
    {
        "role": "user",
        "content": [
            {"type": "input_video", "video_url": "https://films.example/film.mp4"},
            {"type": "input_text", "text": "What is it?"},
        ],
    }
]
MODEL = "fake/model"
pytestmark = pytest.mark.threads


@pytest.fixture
def client(listening):
    with openai.OpenAI(base_url=f"{listening.url}/v1", api_key="none", max_retries=0, timeout=10) as connected:
        yield connected


def an_async_client(listening) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{listening.url}/v1", api_key="none", max_retries=0, timeout=10)


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "tieredkv"
    with pytest.raises(openai.NotFoundError, match="fake/model"):
        client.models.retrieve("gpt-4o")


def test_a_chat_completion(client):
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, seed=7, stop=["END"])
    assert reply.choices[0].message.content == "A red circle."
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens_details.cached_tokens == 960
    assert reply.model_extra["tieredkv"]["evidence"][0]["peak"] == 3.0


def test_our_additions_and_vllms_words_go_in_the_extra_body(client, listening):
    extra = {"media_io_kwargs": {"video": {"fps": 0.5}}, "tieredkv": {"evidence": False}, "top_k": 5}
    client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=1, extra_body=extra)
    (asked,) = listening.engine.asked
    assert (asked.media[0].sampling.fps, asked.evidence, asked.options["top_k"]) == (0.5, False, 5)


def test_a_streamed_chat_completion(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    *chunks, usage = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "A red circle."
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].model_extra["tieredkv"]["reused"] is True
    assert usage.usage.total_tokens == 1003


def test_the_clients_own_reader_of_streams(client):
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        said = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(said) == "A red circle."
    assert final.choices[0].message.content == "A red circle."


def test_streamed_progress_does_not_disturb_it(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, extra_body={"tieredkv": {"progress": True}}
    )
    chunks = list(stream)
    stages = [chunk.model_extra["tieredkv"]["progress"]["stage"] for chunk in chunks if not chunk.choices]
    assert stages == ["queued", "question"]


def test_async_chat_completions(listening):
    async def run() -> tuple[str, str]:
        async with an_async_client(listening) as client:
            whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
            stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content, "".join(pieces)

    assert asyncio.run(run()) == ("A red circle.", "A red circle.")


def test_a_response_and_the_one_that_continues_it(client, listening):
    first = client.responses.create(model=MODEL, input=INPUT, instructions="Be brief.", max_output_tokens=20)
    assert (first.status, first.output_text) == ("completed", "A red circle.")
    assert first.usage.input_tokens_details.cached_tokens == 960
    client.responses.create(model=MODEL, input="And now?", previous_response_id=first.id)
    assert listening.engine.asked[1].turns == (("What is it?", "A red circle."),)
    assert client.responses.retrieve(first.id).output_text == "A red circle."
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_a_streamed_response(client):
    events = list(client.responses.create(model=MODEL, input=INPUT, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "A red circle."
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "A red circle."
    assert events[-1].response.model_extra["tieredkv"]["evidence"]


def test_the_clients_own_reader_of_responses(client):
    with client.responses.stream(model=MODEL, input=INPUT) as stream:
        said = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert said == ["A red ", "circle."]
    assert final.output_text == "A red circle."


def test_progress_among_a_responses_events_does_not_disturb_it(client):
    extra = {"tieredkv": {"progress": True}}
    events = list(client.responses.create(model=MODEL, input=INPUT, stream=True, extra_body=extra))
    assert [event.type for event in events].count("tieredkv.progress") == 2
    with client.responses.stream(model=MODEL, input=INPUT, extra_body=extra) as stream:
        assert stream.get_final_response().output_text == "A red circle."


def test_async_responses(listening):
    async def run() -> tuple[str, list[str]]:
        async with an_async_client(listening) as client:
            whole = await client.responses.create(model=MODEL, input=INPUT)
            stream = await client.responses.create(model=MODEL, input=INPUT, stream=True)
            return whole.output_text, [event.type async for event in stream]

    whole, kinds = asyncio.run(run())
    assert whole == "A red circle."
    assert kinds[-1] == "response.completed"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ApiError(429, "the queue is full: try again in 5 s.", code="queue_full", retry_after=5),
            openai.RateLimitError,
        ),
        (ApiError(401, "give a key.", code="no_key"), openai.AuthenticationError),
        (ApiError(403, "not below --videos.", code="forbidden"), openai.PermissionDeniedError),
        (ApiError(404, "no such film.", code="no_film"), openai.NotFoundError),
        (ApiError(503, "the server is shutting down.", code="shutting_down"), openai.InternalServerError),
        (ApiError(504, "the answer took too long.", code="timeout"), openai.InternalServerError),
        (RuntimeError("a bug"), openai.InternalServerError),
    ],
    ids=lambda value: str(value) if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_exceptions(client, listening, error, expected, stream):
    listening.engine.script = [error]
    with pytest.raises(expected) as raised:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
    if isinstance(error, ApiError):
        assert (raised.value.status_code, raised.value.code) == (error.status, error.code)
        assert raised.value.body["message"] == error.message
    assert raised.value.response.headers.get("retry-after") == ("5" if expected is openai.RateLimitError else None)


def test_a_refused_field_is_a_bad_request_that_names_it(client):
    with pytest.raises(openai.BadRequestError, match="response_format is not supported") as raised:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format={"type": "json_object"})
    assert raised.value.param == "response_format"


def test_a_client_that_retries_gets_its_answer_once_there_is_room(listening):
    played, refusal = listening.engine.script, ApiError(429, "full.", code="queue_full", retry_after=0)
    scripts = [[refusal], played]
    ask = listening.engine.ask

    def in_turn(asked):
        listening.engine.script = scripts.pop(0)
        return ask(asked)

    listening.engine.ask = in_turn
    try:
        with openai.OpenAI(base_url=f"{listening.url}/v1", api_key="none", max_retries=1) as client:
            reply = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    finally:
        del listening.engine.ask
    assert reply.choices[0].message.content == "A red circle."


def test_an_error_in_the_middle_of_a_stream_is_raised_there(client, listening):
    listening.engine.script = [Progress("queued"), Piece("A "), ApiError(504, "too long.", code="timeout")]
    said = []
    with pytest.raises(openai.APIError, match="too long"):
        for chunk in client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True):
            said.append(chunk.choices[0].delta.content)
    assert said == ["", "A "]


def test_an_error_in_the_middle_of_a_response_is_its_last_event(client, listening):
    listening.engine.script = [Piece("A "), ApiError(504, "too long.", code="timeout")]
    *_, error, failed = list(client.responses.create(model=MODEL, input=INPUT, stream=True))
    assert (error.type, error.message) == ("error", "too long.")
    assert (failed.type, failed.response.status) == ("response.failed", "failed")


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_question_is_stopped(listening, stream):
    listening.engine.script = [Piece("A "), 60.0]

    async def run() -> None:
        async with an_async_client(listening) as client:
            reply = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=stream)
            async for _ in reply:
                pass

    async def cancelled() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(run(), 0.4)

    asyncio.run(cancelled())
    assert eventually(lambda: listening.engine.stopped == 1)


def test_a_large_request_is_refused_as_such(client):
    film = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64," + "A" * (65 * 2**20)}}
    with pytest.raises(openai.APIStatusError, match="upload films") as raised:
        client.chat.completions.create(model=MODEL, messages=[user(film, text("?"))])
    assert raised.value.status_code == 413


def test_what_the_client_reads_is_json_without_escapes(client, listening):
    listening.engine.script = [Piece("héllo ✓\n\n"), *listening.engine.script[-1:]]
    with client.chat.completions.with_streaming_response.create(model=MODEL, messages=MESSAGES, stream=True) as raw:
        body = raw.read().decode()
    assert "héllo ✓" in body
    assert json.loads(body.split("\n\n")[1].removeprefix("data: "))["choices"][0]["delta"]["content"] == "héllo ✓\n\n"
