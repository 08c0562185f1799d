"""Messages: which films a conversation is about, what was said, and what is refused."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from serve_examples import FILM, text, user

from tieredkv.serve.errors import ApiError
from tieredkv.serve.protocol.conversation import read
from tieredkv.serve.protocol.parts import Reference

OTHER = {"type": "video_url", "video_url": {"url": "https://films.example/other.mp4"}}
URL = "https://films.example/film.mp4"


def reference(part) -> Reference:
    (found,) = read([user(part, text("What is it?"))]).media
    return found


def refusal(*messages) -> str:
    with pytest.raises(ApiError) as refused:
        read(list(messages))
    assert refused.value.status == 400
    assert refused.value.param
    return refused.value.message


def test_a_question_about_a_film():
    talk = read([{"role": "system", "content": "Be brief."}, user(FILM, text("What is it?"))])
    assert talk.system == "Be brief."
    assert [film.url for film in talk.media] == [URL]
    assert (talk.turns, talk.prompt) == ((), "What is it?")


def test_texts_before_and_after_the_films_follow_them_in_their_order():
    assert read([user(text("Look."), FILM, OTHER, text("What is it?"))]).prompt == "Look.\nWhat is it?"


def test_a_conversation_sent_whole_has_its_turns():
    talk = read([user(FILM, text("One?")), {"role": "assistant", "content": "Yes."}, user(text("Two?"))])
    assert (talk.turns, talk.prompt) == ((("One?", "Yes."),), "Two?")


def test_a_later_message_may_show_the_film_again():
    talk = read([user(FILM, text("One?")), {"role": "assistant", "content": "Yes."}, user(FILM, text("Two?"))])
    assert talk.repeated == talk.media


def test_messages_of_one_role_after_each_other_are_one():
    talk = read([user(FILM), {"role": "user", "content": "What"}, {"role": "user", "content": "is it?"}])
    assert (len(talk.media), talk.prompt) == (1, "What\nis it?")


def test_system_and_developer_texts_are_joined():
    talk = read(
        [{"role": "system", "content": "A"}, {"role": "developer", "content": [text("B")]}, user(FILM, text("?"))]
    )
    assert talk.system == "A\nB"


@pytest.mark.parametrize(
    ("part", "url", "uuid"),
    [
        (FILM, URL, None),
        ({"type": "video_url", "video_url": URL}, URL, None),
        ({**FILM, "uuid": "a"}, URL, "a"),
        ({"type": "video_url", "video_url": {"url": URL, "uuid": "a"}}, URL, "a"),
        ({"type": "video_url", "video_url": None, "uuid": "a"}, None, "a"),
        ({"type": "video_url", "uuid": "a"}, None, "a"),
        ({"type": "video", "video": URL}, URL, None),
        ({"type": "input_video", "input_video": URL}, URL, None),
        ({"type": "input_video", "video_url": URL}, URL, None),
        ({"type": "input_video", "file_id": "file-1"}, "file-1", None),
        ({"type": "file", "file": {"file_id": "file-1"}}, "file-1", None),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, URL, None),
        ({"type": "input_image", "image_url": URL, "detail": "auto"}, URL, None),
    ],
    ids=str,
)
def test_films_are_named_in_the_forms_that_clients_send(part, url, uuid):
    found = reference(part)
    assert (found.url, found.uuid) == (url, uuid)
    assert found.kind == ("image" if "image" in part["type"] else "video")


def test_a_part_may_say_how_its_film_is_sampled():
    found = reference({"type": "video_url", "video_url": {"url": URL, "fps": 0.5}, "max_frames": 8})
    assert found.sampling == {"fps": 0.5, "max_frames": 8}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "list with a message"),
        ([user(text("Hello"))], "shows no film"),
        ([user(FILM)], "no text"),
        ([user(FILM, text(" "))], "no text"),
        ([user(FILM, text("a"), OTHER, text("b"))], "between films"),
        ([user(FILM, text("a")), {"role": "assistant", "content": "b"}], "end with the user's question"),
        ([{"role": "assistant", "content": "b"}, user(FILM, text("a"))], "begins with a message of the user"),
        ([user(FILM, text("a")), {"role": "system", "content": "b"}, user(text("c"))], "comes first"),
        ([{"role": "system", "content": [FILM]}, user(FILM, text("a"))], "shows no film"),
        ([user(FILM, text("a")), {"role": "assistant", "content": [FILM]}, user(text("c"))], "shows no film"),
        ([user(FILM, text("a")), {"role": "tool", "content": "b"}], "messages of a tool"),
        ([{"role": "robot", "content": "a"}], "role is not valid"),
        (["hello"], "is not a message"),
        ([user(FILM, text("a")), {"role": "assistant", "tool_calls": [{}]}, user(text("c"))], "tool_calls"),
        ([user({"type": "input_audio", "input_audio": {}}, text("a"))], "sound"),
        ([user({"type": "poem"}, text("a"))], "type='poem' is not supported"),
        ([user({"type": ["text"]}, text("a"))], "is not supported"),
        ([user({"type": "text"}, FILM)], "is not a text"),
        ([user(7, FILM)], "is not a part"),
        ([{"role": "user", "content": 7}], "neither a text nor a list"),
        ([user({"type": "video_url"}, text("a"))], "names no film"),
        ([user({"type": "video_url", "video_url": {"url": 7}}, text("a"))], "give a text"),
        ([user({"type": "video_url", "video_url": {"url": "a", "file_id": "b"}}, text("c"))], "several films"),
        ([user({"type": "video_url", "uuid": "a", "video_url": {"url": "a", "uuid": "b"}}, text("c"))], "other uuid"),
        ([user({"type": "video_url", "video_url": {"url": "a", "fsp": 1}}, text("c"))], "did you mean fps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_conversation_is_refused_in_a_sentence(messages, words):
    message = refusal(*messages)
    assert words in message
    assert message.endswith((".", "?"))
    assert "\n" not in message


def test_a_refusal_names_the_part_at_fault():
    with pytest.raises(ApiError) as refused:
        read([user(FILM, text("a"), {"type": "input_audio"})])
    assert refused.value.param == "messages[0].content[2]"
