"""A streamer of text that later tokens do not change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers.generation.streamers import BaseStreamer


def token_texts(text: Callable[[list[int]], str], ids: Sequence[int]) -> list[str]:
    """The text that each token of an answer adds; joined, they are `text(ids)`.

    text: the whole text of tokens. A token that completes no character adds nothing, and white space that ends a text
    belongs to the token after it.
    """
    whole, pieces, begin = text(list(ids)), [], 0
    for count in range(1, len(ids) + 1):
        stop = len(whole)
        if count < len(ids):
            so_far = _stable(text(list(ids[:count])))
            same = (number for number, (a, b) in enumerate(zip(so_far, whole, strict=False)) if a != b)
            stop = max(begin, next(same, min(len(so_far), len(whole))))
        pieces.append(whole[begin:stop])
        begin = stop
    return pieces


def _stable(text: str) -> str:
    """What of the text of the first tokens of an answer later tokens do not change."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip()


class StableTextStreamer(BaseStreamer):
    """A transformers streamer that delivers text once no later token can change it.

    Trailing white space is held back, because the final text is stripped of it, and so are replacement characters,
    which stand for an incomplete character. All tokens are decoded each time: an answer's text is not always the
    concatenation of its tokens' texts.
    """

    def __init__(self, text: Callable[[list[int]], str], deliver: Callable[[str], None]) -> None:
        self._text, self._deliver = text, deliver
        self._prompt = True
        self._ids: list[int] = []
        self._sent = ""

    def put(self, value: Any) -> None:
        """Take the prompt, which is ignored, then generated tokens."""
        if self._prompt:
            self._prompt = False
            return
        self._ids.extend(value.flatten().tolist())
        text = _stable(self._text(self._ids))
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self._send(text)

    def end(self) -> None:
        """Does nothing: what is held back is delivered by `finish`, if the answer is complete."""

    def finish(self, text: str) -> None:
        """Deliver the rest of the whole text."""
        # Some tokenizers (byte fallback) change the last character if the answer ends inside the next one.
        while not text.startswith(self._sent):
            self._sent = self._sent[:-1]
        self._send(text)

    def _send(self, text: str) -> None:
        piece, self._sent = text[len(self._sent) :], text
        if piece:
            self._deliver(piece)
