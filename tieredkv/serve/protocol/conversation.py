"""Messages to a conversation: what was said by whom, and which films it is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tieredkv.serve.errors import ApiError
from tieredkv.serve.protocol.parts import Item, Reference, read_content

_SYSTEM = ("system", "developer")
_CALLS = ("tool_calls", "function_call", "audio")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation up to the question that is to be answered."""

    system: str | None
    media: tuple[Reference, ...]
    """Of the first message of the user."""
    repeated: tuple[Reference, ...]
    """Of later ones: each must be one of the first."""
    turns: tuple[tuple[str, str], ...]
    prompt: str


def read(messages: Any, where: str = "messages", begun: bool = False) -> Conversation:
    """Raises `ApiError` for messages that make no conversation, or show films where the model could not see them.

    Messages of one role after each other are one, joined by newlines. Films stand before the text, whichever comes
    first in the first message. where: what the client calls the list. begun: the messages continue a conversation whose
    films are known.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, f"{where} is not a list with a message in it: give one.", param=where)
    system: list[str] = []
    spoken: list[tuple[str, list[Item], str]] = []
    for i, message in enumerate(messages):
        place = f"{where}[{i}]"
        role, items = _message(message, place)
        if role in _SYSTEM:
            if spoken:
                raise ApiError(400, f"{place}: a {role} message comes first or not at all: move it up.", param=place)
            system += _texts_only(items, f"a {role} message", place)
        elif spoken and spoken[-1][0] == role:
            spoken[-1][1].extend(items)
        else:
            spoken.append((role, items, place))
    return _conversation(spoken, "\n".join(system) or None, where, begun)


def _message(message: Any, place: str) -> tuple[str, list[Item]]:
    if not isinstance(message, dict):
        raise ApiError(400, f"{place} is not a message: give an object with role and content.", param=place)
    role = message.get("role")
    if role in ("tool", "function"):
        raise ApiError(
            400,
            f"{place}: messages of a tool are not supported, because no tools are called here: leave it out.",
            code="unsupported",
            param=f"{place}.role",
        )
    if role not in (*_SYSTEM, "user", "assistant"):
        raise ApiError(
            400, f"{place}.role is not valid: give system, developer, user or assistant.", param=f"{place}.role"
        )
    for name in _CALLS:
        if message.get(name):
            raise ApiError(
                400,
                f"{place}.{name} is not supported, because tools and speech are not: leave it out.",
                code="unsupported",
                param=f"{place}.{name}",
            )
    return role, read_content(message.get("content"), f"{place}.content")


def _conversation(
    spoken: Sequence[tuple[str, list[Item], str]], system: str | None, where: str, begun: bool
) -> Conversation:
    if not spoken or spoken[0][0] != "user":
        place = spoken[0][2] if spoken else where
        raise ApiError(400, f"{place}: a conversation begins with a message of the user: put it first.", param=place)
    if spoken[-1][0] != "user":
        place = spoken[-1][2]
        raise ApiError(400, f"{place}: the last message is the assistant's: end with the user's question.", param=place)
    media = [item for item in spoken[0][1] if isinstance(item, Reference)]
    if not begun:
        if not media:
            raise ApiError(
                400,
                f"{where} shows no film: put a video_url part into the first message of the user.",
                code="no_film",
                param=where,
            )
        _check_order(spoken[0][1], spoken[0][2])
    repeated = [
        item for role, items, _ in spoken[1:] if role == "user" for item in items if isinstance(item, Reference)
    ]
    texts = [
        "\n".join(_texts_only(items, "an answer", place) if role == "assistant" else _texts(items))
        for role, items, place in spoken
    ]
    if not texts[-1].strip():
        place = spoken[-1][2]
        raise ApiError(400, f"{place}: the last message has no text: ask something.", param=place)
    turns = tuple(zip(texts[:-1:2], texts[1::2], strict=True))
    films, again = ((), (*media, *repeated)) if begun else (tuple(media), tuple(repeated))
    return Conversation(system, films, again, turns, texts[-1])


def _check_order(items: Sequence[Item], place: str) -> None:
    """Raise `ApiError` for a text between films, which the model would see after them."""
    at = [i for i, item in enumerate(items) if isinstance(item, Reference)]
    if any(isinstance(item, str) for item in items[at[0] : at[-1]]):
        raise ApiError(
            400,
            f"{place}: a text between films is not supported: put the films first and the text after them.",
            param=place,
        )


def _texts(items: Sequence[Item]) -> list[str]:
    return [item for item in items if isinstance(item, str)]


def _texts_only(items: Sequence[Item], what: str, place: str) -> list[str]:
    for item in items:
        if isinstance(item, Reference):
            raise ApiError(400, f"{item.where}: {what} shows no film: put it into the user's message.", param=place)
    return _texts(items)
