"""`POST /v1/chat/completions`: replies, streams and refusals, as their JSON."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("fastapi")

from serve_examples import FILM, chat, comments, events, text, user

from tieredkv.errors import VideoError
from tieredkv.serve.asked import Piece, Progress, Token
from tieredkv.serve.errors import ApiError
from tieredkv.serve.protocol import events as sse
from tieredkv.serve.protocol.refused import CHAT, IGNORED
from tieredkv.video.sampling import Sampling

URL = "/v1/chat/completions"


async def refusal(client, **fields) -> dict:
    reply = await client.post(URL, json=chat(**fields))
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]


async def test_a_reply_is_openais(client, engine):
    reply = await client.post(URL, json=chat())
    assert reply.status_code == 200
    body = reply.json()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "fake/model")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "A red circle.", "refusal": None}
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert body["usage"] == {
        "prompt_tokens": 1000,
        "completion_tokens": 3,
        "total_tokens": 1003,
        "prompt_tokens_details": {"cached_tokens": 960},
    }
    assert engine.closed == 1


async def test_our_additions_are_in_one_object(client):
    added = (await client.post(URL, json=chat())).json()["tieredkv"]
    assert added["evidence"] == [{"start": 2.0, "end": 4.0, "weight": 0.75, "peak": 3.0, "medium": 0}]
    assert added["stats"]["prompt_tokens"] == 1000
    assert added["reused"] is True
    assert [medium["name"] for medium in added["media"]] == ["film.mp4"]


async def test_the_engine_is_asked_what_the_request_asks(client, engine):
    await client.post(
        URL,
        json=chat(
            {"role": "system", "content": "Be brief."},
            user(FILM, text("One?")),
            {"role": "assistant", "content": "Yes."},
            user(text("Two?")),
            media_io_kwargs={"video": {"fps": 0.5, "num_frames": 64}},
            temperature=0,
            max_completion_tokens=9,
            tieredkv={"evidence": "tokens", "timestamps": True},
        ),
    )
    (asked,) = engine.asked
    assert (asked.system, asked.turns, asked.prompt) == ("Be brief.", (("One?", "Yes."),), "Two?")
    assert asked.media[0].film.name == "film.mp4"
    assert asked.media[0].sampling == Sampling(fps=0.5, max_frames=64)
    assert asked.options == {"max_new_tokens": 9, "do_sample": False}
    assert (asked.evidence, asked.timestamps) == ("tokens", True)
    assert asked.client == "127.0.0.1"


async def test_max_tokens_is_the_older_name(client, engine):
    await client.post(URL, json=chat(max_tokens=5))
    assert engine.asked[0].options["max_new_tokens"] == 5


async def test_films_are_pinned_only_while_they_are_asked_about(client, engine, library):
    play, pinned = engine._play, []

    def spied(script):
        pinned.extend(library.pinned)
        return play(script)

    engine._play = spied
    await client.post(URL, json=chat())
    assert [film.name for film in pinned] == ["film.mp4"]
    assert library.pinned == []


async def test_moments_of_tokens_are_beside_the_answer(client, answers):
    moment = {"start": 2.0}
    answers("A red", tokens=(Token("A ", ()), Token("red", (moment,))))
    added = (await client.post(URL, json=chat(tieredkv={"evidence": "tokens"}))).json()["tieredkv"]
    assert added["token_evidence"] == [{"text": "A ", "moments": []}, {"text": "red", "moments": [moment]}]


async def test_a_stream_is_openais(client):
    reply = await client.post(URL, json=chat(stream=True))
    assert reply.headers["content-type"].startswith("text/event-stream")
    chunks = events(reply.text)
    assert chunks.pop() == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "A red "},
        {"content": "circle."},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert chunks[-1]["tieredkv"]["evidence"][0]["start"] == 2.0


async def test_usage_comes_last_if_it_is_asked_for(client):
    stream = await client.post(URL, json=chat(stream=True, stream_options={"include_usage": True}))
    *chunks, last, done = events(stream.text)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 1003


async def test_progress_is_in_comments(client):
    stream = (await client.post(URL, json=chat(stream=True))).text
    assert comments(stream) == [": queued 0 0.0 s", ": question 0/40 0.0 s"]


async def test_progress_is_in_chunks_if_it_is_asked_for(client):
    stream = (await client.post(URL, json=chat(stream=True, tieredkv={"progress": True}))).text
    assert comments(stream) == []
    first, second, *_ = events(stream)
    assert first["choices"] == []
    assert second["tieredkv"]["progress"] == {"stage": "question", "done": 0, "total": 40, "seconds": 0.0}


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029", "\x0c", "\r"], ids=ascii)
async def test_an_event_is_one_line_for_clients_that_split_text(client, answers, end):
    answers(f"one{end}two")
    stream = (await client.post(URL, json=chat(stream=True))).text
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: {")]
    assert f"one{end}two" in [json.loads(line)["choices"][0]["delta"].get("content") for line in lines]


async def test_a_comment_shows_that_a_quiet_stream_is_alive(client, engine, monkeypatch):
    monkeypatch.setattr(sse, "QUIET_S", 0.02)
    engine.script.insert(1, 0.2)
    stream = (await client.post(URL, json=chat(stream=True))).text
    assert ": still at work" in comments(stream)
    assert events(stream)[-1] == "[DONE]"


async def test_an_error_in_the_middle_of_a_stream_ends_it(client, engine):
    engine.script = [Progress("queued"), Piece("A "), ApiError(504, "the answer took too long.", code="timeout")]
    stream = await client.post(URL, json=chat(stream=True))
    assert stream.status_code == 200
    last = events(stream.text)[-1]
    assert last["error"]["code"] == "timeout"
    assert last["error"]["type"] == "server_error"


async def test_a_bug_in_the_middle_of_a_stream_tells_nothing_of_the_server(client, engine, caplog):
    engine.script = [Piece("A "), RuntimeError("secret of the server")]
    stream = (await client.post(URL, json=chat(stream=True))).text
    assert "secret" not in stream
    assert events(stream)[-1]["error"]["type"] == "server_error"
    assert "secret of the server" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_before_the_first_event_has_its_own_status(client, engine, stream):
    engine.script = [ApiError(429, "the queue is full: try again in 5 s.", code="queue_full", retry_after=5)]
    reply = await client.post(URL, json=chat(stream=stream))
    assert (reply.status_code, reply.headers["Retry-After"]) == (429, "5")
    assert reply.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_wrong_with_a_film_is_a_bad_request(client, engine, stream):
    engine.script = [VideoError("film.mp4: not a video.")]
    reply = await client.post(URL, json=chat(stream=stream))
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "film.mp4: not a video.")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_film_that_is_not_there_is_named(client, stream):
    film = {"type": "video_url", "video_url": {"url": "file-missing"}}
    reply = await client.post(URL, json=chat(user(film, text("What?")), stream=stream))
    assert reply.status_code == 404
    assert reply.json()["error"]["param"] == "messages[0].content[0]"


async def test_a_stop_text_ends_the_answer_before_it(client, answers, engine):
    tokens = tuple(Token(word, ()) for word in ("A red ", "EN", "D of it"))
    answers("A red ", "EN", "D of it", finish="length", tokens=tokens)
    body = (await client.post(URL, json=chat(stop=["END"]))).json()
    assert body["choices"][0]["message"]["content"] == "A red "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["tieredkv"]["token_evidence"] == [{"text": "A red ", "moments": []}]
    assert engine.asked[0].options["stop_strings"] == ["END"]
    stream = (await client.post(URL, json=chat(stop=["END"], stream=True))).text
    said = [chunk["choices"][0]["delta"].get("content", "") for chunk in events(stream)[:-1]]
    assert "".join(said) == "A red "


async def test_an_answer_that_was_cut_short_says_so(client, answers):
    answers("A red", finish="length")
    body = (await client.post(URL, json=chat())).json()
    assert body["choices"][0]["finish_reason"] == "length"


async def test_tokens_of_a_new_film_were_not_cached(client, answers):
    answers("A red", reused=False)
    body = (await client.post(URL, json=chat())).json()
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_another_film_later_is_refused(client):
    other = {"type": "video_url", "video_url": {"url": "https://films.example/other.mp4"}}
    messages = [user(FILM, text("One?")), {"role": "assistant", "content": "Yes."}, user(other, text("Two?"))]
    reply = await client.post(URL, json=chat(*messages))
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "new_film")


async def test_the_same_bytes_by_another_name_are_the_same_film(client, engine):
    named = {**FILM, "uuid": "a"}
    again = {"type": "video_url", "uuid": "a"}
    messages = [user(named, text("One?")), {"role": "assistant", "content": "Yes."}, user(again, text("Two?"))]
    assert (await client.post(URL, json=chat(*messages))).status_code == 200
    assert len(engine.asked[0].media) == 1


SENT = {
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "n": 2,
    "response_format": {"type": "json_object"},
    "logit_bias": {"7": 100},
    "logprobs": True,
    "top_logprobs": 3,
    "audio": {"voice": "alloy"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "A"},
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "reasoning_effort": "high",
    "use_beam_search": True,
    "echo": True,
    "best_of": 2,
}


@pytest.mark.parametrize("name", CHAT)
async def test_a_field_that_would_change_the_answer_is_refused_by_name(client, engine, name):
    error = await refusal(client, **{name: SENT.get(name, "anything")})
    assert error["param"] == name
    assert re.match(rf"{name} is not supported( above 1)?[,:] ", error["message"])
    assert error["message"].endswith(".")
    assert engine.asked == []


@pytest.mark.parametrize("name", CHAT)
async def test_values_that_mean_what_happens_anyway_are_accepted(client, name):
    for value in (None, *CHAT[name].harmless):
        assert (await client.post(URL, json=chat(**{name: value}))).status_code == 200


async def test_a_switch_is_not_a_number(client):
    assert (await refusal(client, logprobs=0))["param"] == "logprobs"


async def test_fields_that_change_nothing_are_ignored(client):
    fields = {name: {"anything": 1} for name in IGNORED}
    assert (await client.post(URL, json=chat(**fields))).status_code == 200


async def test_a_field_that_nobody_knows_is_refused_with_the_one_meant(client):
    assert (await refusal(client, temprature=1))["message"].endswith("did you mean temperature?")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"messages": "hello"}, "messages"),
        ({"stream": "maybe"}, "stream"),
        ({"tieredkv": {"evidnce": True}}, "tieredkv.evidnce"),
        ({"tieredkv": {"evidence": "some"}}, "tieredkv.evidence.bool"),
        ({"media_io_kwargs": {"video": {"fsp": 1}}}, "media_io_kwargs.video.fsp"),
        ({"stop": ["a"] * 5}, "stop"),
    ],
    ids=str,
)
async def test_a_wrong_value_is_refused_in_a_sentence_that_names_it(client, fields, param):
    error = await refusal(client, **fields)
    assert error["param"].startswith(param.removesuffix(".bool"))
    assert error["message"].endswith((".", "?"))
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"x" * 50_000: 1},
        {"media_io_kwargs": {"video": {"fps": "x" * 50_000}}},
        {"media_io_kwargs": {"x" * 50_000: {"fps": 1}}},
        {"tieredkv": {"x" * 50_000: 1}},
        {"messages": [{"role": "x" * 50_000}]},
        {"stop": ["x" * 50_000]},
    ],
    ids=lambda fields: next(iter(fields))[:20],
)
async def test_a_message_does_not_repeat_all_that_was_sent(client, fields):
    assert len(str(await refusal(client, **fields))) < 2000


async def test_without_messages_the_message_says_what_is_missing(client):
    reply = await client.post(URL, json={"model": "fake/model"})
    assert reply.json()["error"]["message"] == "messages is missing: give it."


async def test_another_model_is_not_found(client):
    reply = await client.post(URL, json=chat(model="gpt-4o"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_client_is_known_by_its_key_which_is_not_kept(two_clients, engine):
    for client in two_clients:
        await client.post(URL, json=chat())
    first, second = (asked.client for asked in engine.asked)
    assert first != second
    assert not any("of-the" in name for name in (first, second))


async def test_a_name_for_a_film_is_the_clients_own(two_clients):
    mine, yours = two_clients
    await mine.post(URL, json=chat(user({**FILM, "uuid": "a"}, text("?"))))
    again = chat(user({"type": "video_url", "uuid": "a"}, text("?")))
    assert (await mine.post(URL, json=again)).status_code == 200
    assert (await yours.post(URL, json=again)).status_code == 404
