"""`/v1/responses`: replies, events, and conversations that go on by the id of their last response."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from serve_examples import events

from tieredkv.serve.asked import Piece
from tieredkv.serve.errors import ApiError
from tieredkv.serve.protocol.conversations import Conversations, Kept
from tieredkv.serve.protocol.refused import RESPONSES
from tieredkv.video.sampling import Sampling

URL = "/v1/responses"
FILM = {"type": "input_video", "video_url": "https://films.example/film.mp4"}
FIRST = [{"role": "user", "content": [FILM, {"type": "input_text", "text": "One?"}]}]


async def respond(client, given=FIRST, **fields) -> dict:
    reply = await client.post(URL, json={"model": "fake/model", "input": given, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def refusal(client, given=FIRST, status=400, **fields) -> dict:
    reply = await client.post(URL, json={"model": "fake/model", "input": given, **fields})
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


async def test_a_response_is_openais(client):
    body = await respond(client)
    assert body["id"].startswith("resp_")
    assert (body["object"], body["status"], body["error"]) == ("response", "completed", None)
    (message,) = body["output"]
    assert (message["type"], message["role"]) == ("message", "assistant")
    assert message["content"] == [{"type": "output_text", "text": "A red circle.", "annotations": [], "logprobs": []}]
    assert body["usage"]["input_tokens"] == 1000
    assert body["usage"]["input_tokens_details"] == {"cached_tokens": 960}
    assert body["tieredkv"]["evidence"][0]["start"] == 2.0


async def test_an_answer_that_was_cut_short_is_incomplete(client, answers):
    answers("A red", finish="length")
    body = await respond(client, max_output_tokens=2)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


async def test_a_conversation_goes_on_by_the_id_of_its_last_response(client, engine, answers):
    first = await respond(client, media_io_kwargs={"video": {"fps": 0.5}})
    answers("Blue.")
    second = await respond(client, "Two?", previous_response_id=first["id"])
    await respond(client, "Three?", previous_response_id=second["id"])
    asked = engine.asked[-1]
    assert asked.turns == (("One?", "A red circle."), ("Two?", "Blue."))
    assert asked.prompt == "Three?"
    assert asked.media == engine.asked[0].media
    assert asked.media[0].sampling == Sampling(fps=0.5)


async def test_a_conversation_may_fork(client, engine):
    first = await respond(client)
    await respond(client, "Two?", previous_response_id=first["id"])
    await respond(client, "Other?", previous_response_id=first["id"])
    assert engine.asked[-1].turns == (("One?", "A red circle."),)


async def test_a_later_question_may_have_other_frames(client, engine):
    first = await respond(client)
    await respond(client, "Two?", previous_response_id=first["id"], media_io_kwargs={"video": {"fps": 2}})
    assert engine.asked[-1].media[0].sampling == Sampling(fps=2)


async def test_a_later_question_may_show_the_film_again_but_no_other(client, engine):
    first = await respond(client)
    await respond(client, FIRST, previous_response_id=first["id"])
    assert len(engine.asked[-1].media) == 1
    other = {"type": "input_video", "video_url": "https://films.example/other.mp4"}
    given = [{"role": "user", "content": [other, {"type": "input_text", "text": "Two?"}]}]
    assert (await refusal(client, given, previous_response_id=first["id"]))["code"] == "new_film"


async def test_a_film_that_is_shown_again_is_where_it_lies_now(client, engine, library, tmp_path):
    first = await respond(client, media_io_kwargs={"video": {"fps": 0.5}})
    library.folder = tmp_path / "elsewhere"
    await respond(client, FIRST, previous_response_id=first["id"])
    (shown,) = engine.asked[-1].media
    assert shown.film.path.parent == library.folder
    assert shown.sampling == Sampling(fps=0.5)


async def test_instructions_are_of_one_response_and_system_messages_of_the_conversation(client, engine):
    given = [{"role": "developer", "content": "Be brief."}, *FIRST]
    first = await respond(client, given, instructions="In German.")
    await respond(client, "Two?", previous_response_id=first["id"])
    assert [asked.system for asked in engine.asked] == ["In German.\nBe brief.", "Be brief."]


async def test_the_output_of_a_response_may_be_sent_back(client, engine):
    first = await respond(client)
    await respond(client, [*FIRST, *first["output"], {"role": "user", "content": "Two?"}])
    assert engine.asked[-1].turns == (("One?", "A red circle."),)


@pytest.mark.parametrize("name", ["resp_unknown", "x" * 500])
async def test_an_unknown_response_is_not_found(client, name):
    error = await refusal(client, "Two?", 404, previous_response_id=name)
    assert error["param"] == "previous_response_id"
    assert error["message"].endswith("send the whole conversation.")


async def test_what_is_not_stored_cannot_be_continued(client):
    first = await respond(client, store=False)
    await refusal(client, "Two?", 404, previous_response_id=first["id"])
    assert (await client.get(f"{URL}/{first['id']}")).status_code == 404


async def test_a_response_can_be_had_again_until_it_is_deleted(client):
    first = await respond(client)
    assert (await client.get(f"{URL}/{first['id']}")).json() == first
    deleted = (await client.delete(f"{URL}/{first['id']}")).json()
    assert deleted == {"id": first["id"], "object": "response", "deleted": True}
    assert (await client.get(f"{URL}/{first['id']}")).status_code == 404
    assert (await client.delete(f"{URL}/{first['id']}")).status_code == 404


async def test_another_clients_response_is_not_found(two_clients):
    mine, yours = two_clients
    first = (await mine.post(URL, json={"input": FIRST})).json()
    path = f"{URL}/{first['id']}"
    assert (await yours.get(path)).status_code == 404
    assert (await yours.delete(path)).status_code == 404
    more = {"input": "Two?", "previous_response_id": first["id"]}
    assert (await yours.post(URL, json=more)).status_code == 404
    assert (await mine.get(path)).status_code == 200


async def test_the_events_are_openais_in_their_order(client):
    reply = await client.post(URL, json={"input": FIRST, "stream": True})
    found = events(reply.text)
    assert [event["type"] for event in found] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert "event: response.completed" in reply.text
    body = found[-1]["response"]
    assert body["output"][0]["content"][0]["text"] == "A red circle."
    assert (await client.get(f"{URL}/{body['id']}")).json() == body


async def test_an_error_in_the_middle_of_a_stream_fails_the_response(client, engine):
    engine.script = [Piece("A "), ApiError(504, "the answer took too long.", code="timeout")]
    reply = await client.post(URL, json={"input": FIRST, "stream": True})
    *_, error, failed = events(reply.text)
    assert (error["type"], error["code"]) == ("error", "timeout")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"]["message"] == "the answer took too long."


async def test_progress_is_in_events_if_it_is_asked_for(client):
    reply = await client.post(URL, json={"input": FIRST, "stream": True, "tieredkv": {"progress": True}})
    stages = [event["progress"]["stage"] for event in events(reply.text) if event["type"] == "tieredkv.progress"]
    assert stages == ["queued", "question"]


SENT = {
    "tool_choice": "required",
    "background": True,
    "truncation": "auto",
    "top_logprobs": 3,
    "reasoning": {"effort": "low"},
}


@pytest.mark.parametrize("name", RESPONSES)
async def test_a_field_that_would_change_the_answer_is_refused_by_name(client, engine, name):
    error = await refusal(client, **{name: SENT.get(name, "anything")})
    assert error["param"] == name
    assert engine.asked == []


@pytest.mark.parametrize("name", RESPONSES)
async def test_values_that_mean_what_happens_anyway_are_accepted(client, name):
    for value in (None, *RESPONSES[name].harmless):
        await respond(client, **{name: value})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("What?", "shows no film"),
        ([{"type": "function_call_output", "output": "x"}], "function_call_output"),
        ([{"type": "item_reference", "id": "x"}], "item_reference"),
        ([{"type": 7}], "items of type 7"),
        ([], "list with a message"),
        ([7], "is not a message"),
    ],
    ids=str,
)
async def test_input_that_makes_no_conversation_is_refused(client, given, words):
    assert words in (await refusal(client, given))["message"]


async def test_probabilities_cannot_be_included(client):
    error = await refusal(client, include=["message.output_text.logprobs"])
    assert error["param"] == "include"


def kept(name: str, size: int = 10) -> Kept:
    return Kept("me", {"id": name}, (), (("x" * size, ""),), None)


def test_the_responses_used_least_recently_are_forgotten_first():
    conversations = Conversations(most=2)
    conversations.keep(kept("a"))
    conversations.keep(kept("b"))
    conversations.find("a", "me")
    conversations.keep(kept("c"))
    assert len(conversations) == 2
    with pytest.raises(ApiError, match="'b'"):
        conversations.find("b", "me")


def test_responses_are_bounded_by_their_text_too():
    conversations = Conversations(most_characters=1000)
    conversations.keep(kept("a", 600))
    conversations.keep(kept("b", 600))
    assert len(conversations) == 1
    conversations.keep(kept("c", 2000))
    assert len(conversations) == 0
