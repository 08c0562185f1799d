"""Conversations that `POST /v1/responses` may continue by the id of their last response: in memory, bounded."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from tieredkv.serve.asked import Shown
from tieredkv.serve.errors import ApiError

MOST = 1000
MOST_CHARACTERS = 32 * 2**20
"""Of all kept responses and their turns."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A response, and the conversation up to it."""

    client: str
    """Who may see and continue it."""
    body: dict[str, Any]
    """The response as it was sent."""
    media: tuple[Shown, ...]
    turns: tuple[tuple[str, str], ...]
    """The answer of this response is in the last one."""
    system: str | None

    @property
    def characters(self) -> int:
        """How much of the bound it takes."""
        return len(json.dumps(self.body)) + sum(len(question) + len(answer) for question, answer in self.turns)


class Conversations:
    """Responses by id. Those used least recently are forgotten first."""

    def __init__(self, most: int = MOST, most_characters: int = MOST_CHARACTERS) -> None:
        self._most, self._most_characters = most, most_characters
        self._kept: OrderedDict[str, tuple[Kept, int]] = OrderedDict()
        self._characters = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, kept: Kept) -> None:
        """Keep a response; forgets others if there would be too many."""
        size = kept.characters
        self._kept[kept.body["id"]] = kept, size
        self._characters += size
        while len(self._kept) > self._most or self._characters > self._most_characters:
            _, (_, freed) = self._kept.popitem(last=False)
            self._characters -= freed

    def find(self, name: str, client: str, param: str | None = None) -> Kept:
        """The response of that id. Raises `ApiError` if there is none, or it is another client's."""
        kept = self._kept.get(name)
        if kept is None or kept[0].client != client:
            raise ApiError(
                404,
                f"there is no response {name[:80]!r}: it was not stored, or is forgotten; send the whole conversation.",
                code="response_not_found",
                param=param,
            )
        self._kept.move_to_end(name)
        return kept[0]

    def forget(self, name: str, client: str) -> None:
        """Raises `ApiError` like `find`."""
        self.find(name, client)
        _, size = self._kept.pop(name)
        self._characters -= size
