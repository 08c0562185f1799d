"""The conversation of a session file, in a small file beside it: `film.tkv` has `film.tkv.chat`.

A session file can be many GiB, and other processes may have it mapped, which refuse a file that is changed in place. To
keep a turn, only the small file is replaced, whole or not at all. It names its session file by the checksum of that
file's header; beside another file of the same name it counts as absent.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tieredkv.errors import SessionError
from tieredkv.storage import header
from tieredkv.storage.atomic import check_name, replace_file

SUFFIX = ".chat"
FORMAT_VERSION = 1
Turns = list[tuple[str, str]]
"""Questions and answers."""


def check(session: Path) -> None:
    """Raise `SessionError` if no file can have this name, or what is beside it is no conversation."""
    with header.session_errors():
        check_name(session)
    ConversationFile(session, -1, [])


@contextmanager
def one_chat(session: Path) -> Iterator[None]:
    """Keeps a second chat off a session file: of two, the one that ends last could not keep its turns.

    Raises `SessionError` at once if another is in this block, in this process or another. Locks the session file
    itself, so that nothing is left beside it; the system releases the lock of a process that was killed. A file that
    cannot be opened or locked stays unlocked: `ConversationFile.write` then still refuses the second writer.
    """
    try:
        descriptor = os.open(session, os.O_RDONLY | os.O_NONBLOCK)  # a pipe does not block
    except (OSError, ValueError):  # reported when it is read
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SessionError(
                f"{session} is in use by another chat: end that one first, or copy the file and give the copy."
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


class ConversationFile:
    """The conversation beside one session file."""

    def __init__(self, session: Path, checksum: int, own: Turns) -> None:
        """session: the session file. checksum: of its header. own: the turns that it holds itself.

        Raises `SessionError` for a conversation that is damaged or in a newer format, and for another program's file.
        """
        self.path = session.with_name(session.name + SUFFIX)
        self._session, self._checksum, self._own = session, checksum, list(own)
        self.turns = self._read()
        """As last read or written; those of the session file itself if none are beside it."""

    def write(self, turns: Turns) -> bool:
        """Keep these turns unless they are kept already; returns whether anything was written.

        Raises `SessionError` if the session file or this one was changed by another program, or the disk fails.
        """
        if turns == self.turns:
            return False
        try:
            changed = header.read(self._session).checksum != self._checksum
        except SessionError as error:
            raise SessionError(f"the conversation cannot be kept beside its session: {error}") from None
        if changed:
            raise SessionError(
                f"{self._session} was replaced by another program meanwhile, so the conversation is not kept beside "
                "it: save the session to another file."
            )
        if self._read() != self.turns:
            raise SessionError(
                f"{self.path} was written by another program meanwhile, and is not overwritten: save the session to "
                "another file."
            )
        plain = {
            "tieredkv_chat": FORMAT_VERSION,
            "session": self._checksum,
            "turns": turns,
            "checksum": self._crc(turns),
        }
        text = json.dumps(plain, indent=1)
        with header.session_errors(), replace_file(self.path, len(text)) as part:
            part.write_text(text)
        self.turns = list(turns)
        return True

    def remove(self) -> None:
        """Remove the file, after the session file was written anew with its conversation. Another program's stays."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        self.turns = self._own

    def _crc(self, turns: Turns) -> int:
        return zlib.crc32(json.dumps([self._checksum, turns]).encode())

    def _read(self) -> Turns:
        try:
            text = self.path.read_text("utf-8")
        except FileNotFoundError:
            return self._own
        except (OSError, ValueError) as error:
            raise SessionError(f"{self.path} cannot be read ({error}): move it away to go on without it.") from None
        try:
            plain = json.loads(text)
            if plain["tieredkv_chat"] > FORMAT_VERSION:
                raise SessionError(f"{self.path} was written by a newer tieredkv: update.")
            if plain["session"] != self._checksum:
                return self._own
            turns = [(str(question), str(answer)) for question, answer in plain["turns"]]
            if plain["checksum"] != self._crc(turns):
                raise ValueError
        except SessionError:
            raise
        except (ValueError, TypeError, KeyError):
            raise SessionError(
                f"{self.path} is damaged, or another program's: move it away to go on without its conversation."
            ) from None
        return turns
