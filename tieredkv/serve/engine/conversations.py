"""The conversations about one session's films: clients send theirs whole, and what was read of them is found again."""

from __future__ import annotations

from collections.abc import Sequence

from tieredkv.session.conversation import Conversation

MOST = 16
"""Conversations of a session."""
MOST_BYTES = 2**28
"""What they may keep in host memory."""

Turns = Sequence[tuple[str, str]]


class Conversations:
    """Those asked last, within limits. What they keep is never trusted: `Conversation.passage` compares token ids."""

    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._known: list[Conversation] = []
        """The least recently used first."""

    def __len__(self) -> int:
        return len(self._known)

    @property
    def nbytes(self) -> int:
        """Host memory of all that they keep."""
        return sum({id(known.kept): known.nbytes for known in self._known}.values())

    def begin(self, turns: Turns) -> Conversation:
        """A conversation with these turns that starts from what the most similar one has kept. Changes none."""
        conversation = Conversation(turns)
        best = max(self._known, key=lambda known: _common(known.turns, turns), default=None)
        if best is not None and _common(best.turns, turns):
            self._known.remove(best)
            self._known.append(best)
            conversation.kept = best.kept
        return conversation

    def keep(self, conversation: Conversation) -> None:
        """Keep a conversation whose last question was answered, in place of those that it continues."""
        self._known = [known for known in self._known if not _is_continued(known, conversation)]
        self._known.append(conversation)
        while len(self._known) > self._most or self.nbytes > self._most_bytes:
            del self._known[0]

    def forget(self) -> None:
        """Keep none."""
        self._known.clear()


def _texts(turns: Turns) -> list[str]:
    """Clients may trim texts."""
    return [text.strip() for turn in turns for text in turn]


def _common(some: Turns, others: Turns) -> int:
    """How many questions and answers two conversations have in common, from the first on."""
    count = 0
    for one, other in zip(_texts(some), _texts(others), strict=False):
        if one != other:
            break
        count += 1
    return count


def _is_continued(known: Conversation, later: Conversation) -> bool:
    """Whether what `later` keeps holds all that `known` does, and can be cut to it: with a snapshot it cannot."""
    if later.kept is None or (known.kept is not None and known.kept.passage.snapshot is not None):
        return False
    return _common(known.turns, later.turns) == 2 * len(known.turns)
