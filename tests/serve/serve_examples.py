"""Requests that several tests send, and how to read a stream."""

from __future__ import annotations

import json
from typing import Any

FILM = {"type": "video_url", "video_url": {"url": "https://films.example/film.mp4"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    """The JSON of a chat completion: a question about a film, unless messages are given."""
    return {"model": "fake/model", "messages": list(messages) or [user(FILM, text("What is it?"))], **fields}


def events(stream: str) -> list[Any]:
    """The data of a stream's events: JSON, or the text that is none. Comments are left out."""
    found = []
    for block in stream.split("\n\n"):
        lines = [line.removeprefix("data: ") for line in block.splitlines() if line.startswith("data: ")]
        if lines:
            found.append("[DONE]" if lines == ["[DONE]"] else json.loads("\n".join(lines)))
    return found


def comments(stream: str) -> list[str]:
    return [line for line in stream.splitlines() if line.startswith(":")]
