"""Stop texts: an answer ends before the first of them, also where one is spread over several pieces."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Lets text through until a stop text begins in it. Holds back what may be the beginning of one."""

    def __init__(self, texts: Sequence[str]) -> None:
        """texts: none empty; without any, all text passes at once."""
        self._texts = tuple(texts)
        self._held = ""
        self.found = False
        """Whether a stop text came: nothing passes any more."""

    def feed(self, piece: str) -> str:
        """The next characters of the answer, of those held back and of `piece`."""
        if self.found:
            return ""
        text = self._held + piece
        self._held = ""
        at = self._first(text)
        if at is not None:
            self.found = True
            return text[:at]
        keep = self._beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back, once no more comes."""
        text, self._held = self._held, ""
        return text

    def cut(self, text: str) -> str:
        """A whole answer up to its first stop text."""
        at = self._first(text)
        return text if at is None else text[:at]

    def _first(self, text: str) -> int | None:
        """Where the stop text begins that is complete first: what follows it is not there yet where text comes letter
        by letter, and must not matter where it comes at once."""
        places = [(at + len(stop), at) for stop in self._texts if (at := text.find(stop)) >= 0]
        return min(places)[1] if places else None

    def _beginning(self, text: str) -> int:
        """How many characters at the end of `text` are the beginning of a stop text."""
        longest = 0
        for stop in self._texts:
            for n in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:n]):
                    longest = n
                    break
        return longest
