"""OpenAI's own client, and the bundled model: a question through HTTP is answered as the library answers it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai
from engine_examples import OTHER, QUESTION, TIERS
from fastapi import FastAPI
from serve_fakes import listening_server

import tieredkv
from tieredkv.models.loading import load
from tieredkv.serve.app import create_app
from tieredkv.serve.engine.engine import ModelEngine
from tieredkv.serve.media.library import Library
from tieredkv.serve.settings import Settings
from tieredkv.tiny.model import PATH

pytestmark = [pytest.mark.model, pytest.mark.threads]


@pytest.fixture(scope="module")
def model():
    return load(str(PATH), None)


@pytest.fixture(scope="module")
def plain(model, short_video):
    """What the library answers: two questions after each other, one sampled, and one with a stop text."""
    with tieredkv.open_session(model[0], short_video, processor=model[1], fps=4, **TIERS) as session:
        turns = [session.chat(prompt, max_new_tokens=8) for prompt in (QUESTION, OTHER)]
        sampled = session.ask(QUESTION, max_new_tokens=8, do_sample=True, temperature=1.5, seed=11)
    return turns, sampled


@pytest.fixture(scope="module")
def served(model, short_video) -> Iterator[openai.OpenAI]:
    """A client of a server that has everything but a page."""
    settings = Settings(tiers=dict(TIERS), fps=4, max_new_tokens=8, videos=short_video.parent)
    library = Library(settings)
    engine = ModelEngine(*model, settings, library.source)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        await library.open()
        await engine.start()
        yield
        await engine.stop(0)
        await library.close()

    with (
        listening_server(create_app(settings, engine, library, running)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def film(served, short_video) -> dict:
    """The film, uploaded: a part of a message."""
    uploaded = served.files.create(file=short_video, purpose="user_data")
    assert uploaded.bytes == short_video.stat().st_size
    return {"type": "video_url", "video_url": {"url": uploaded.id}}


def ask(client: openai.OpenAI, film: dict, *turns: str, **fields):
    """Ask the last of these; those before are questions and answers in turn."""
    roles = ["user", "assistant"] * len(turns)
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in zip(roles, turns, strict=False)
    ]
    messages[0]["content"].insert(0, film)
    return client.chat.completions.create(model="tieredkv-tiny", messages=messages, **fields)


def said(reply) -> str:
    return reply.choices[0].message.content


def test_the_answer_and_its_moments_are_the_librarys(served, film, plain):
    first = plain[0][0]
    reply = ask(served, film, QUESTION)
    assert said(reply) == first.text
    assert reply.model_extra["tieredkv"]["evidence"] == [moment.as_dict() for moment in first.evidence]
    assert reply.usage.completion_tokens == len(first.token_ids)


def test_a_stream_says_the_same(served, film, plain):
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(served, film, QUESTION, stream=True)]
    assert "".join(pieces) == plain[0][0].text
    assert len(pieces) > 2


def test_a_conversation_sent_whole_is_the_sessions(served, film, plain):
    first, second = plain[0]
    reply = ask(served, film, QUESTION, first.text, OTHER)
    assert said(reply) == second.text
    assert reply.model_extra["tieredkv"]["reused"] is True
    assert reply.usage.prompt_tokens_details.cached_tokens > reply.usage.prompt_tokens / 2


def test_a_response_is_continued_as_the_session_is(served, film, plain):
    first, second = plain[0]
    given = [{"role": "user", "content": [film, {"type": "input_text", "text": QUESTION}]}]
    one = served.responses.create(model="tieredkv-tiny", input=given)
    two = served.responses.create(model="tieredkv-tiny", input=OTHER, previous_response_id=one.id)
    assert (one.output_text, two.output_text) == (first.text, second.text)


def test_a_seed_draws_what_it_draws_in_the_library(served, film, plain):
    texts = {said(ask(served, film, QUESTION, temperature=1.5, seed=11)) for _ in range(2)}
    assert texts == {plain[1].text}


def test_a_stop_text_ends_the_answer_before_it(served, film, plain):
    whole = plain[0][0].text
    stop = whole[len(whole) // 2 :]
    reply = ask(served, film, QUESTION, stop=[stop])
    assert (said(reply), reply.choices[0].finish_reason) == (whole[: whole.index(stop)], "stop")


def test_the_token_that_is_too_much_is_not_said(served, film, plain):
    reply = ask(served, film, QUESTION, max_completion_tokens=1)
    assert reply.choices[0].finish_reason == "length"
    assert plain[0][0].text.startswith(said(reply))


def test_tokens_of_an_answer_have_moments_of_their_own(served, film):
    reply = ask(served, film, QUESTION, extra_body={"tieredkv": {"evidence": "tokens"}})
    tokens = reply.model_extra["tieredkv"]["token_evidence"]
    assert "".join(token["text"] for token in tokens) == said(reply)
    assert any(token["moments"] for token in tokens)


def test_other_frames_are_another_cache(served, film):
    extra = {"media_io_kwargs": {"video": {"fps": 2, "end": 20}}}
    reply, again = (ask(served, film, QUESTION, extra_body=extra) for _ in range(2))
    assert reply.model_extra["tieredkv"]["reused"] is False
    assert again.model_extra["tieredkv"]["reused"] is True
    assert reply.usage.prompt_tokens < ask(served, film, QUESTION).usage.prompt_tokens


def test_the_file_itself_is_the_upload(served, film, short_video):
    by_path = {"type": "video_url", "video_url": {"url": short_video.as_uri()}}
    assert ask(served, by_path, QUESTION).model_extra["tieredkv"]["reused"] is True


def test_what_is_wrong_is_said_in_the_engines_own_words(served, film):
    with pytest.raises(openai.BadRequestError, match=r"start=500 .* is past the end"):
        ask(served, film, QUESTION, extra_body={"media_io_kwargs": {"video": {"start": 500}}})
    nothing = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,bm8gZmlsbQ=="}}
    with pytest.raises(openai.BadRequestError, match="not a"):
        ask(served, nothing, QUESTION)
