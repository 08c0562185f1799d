"""Sessions: the films that were asked about, least recently used over three tiers, each under its cap.

On the device is only the session that is being asked, or was asked last. In host memory are the open sessions; on disk,
in files, those that were saved. A session leaves the device when another is asked, host memory when another needs the
room, and the disk likewise. What is in use never leaves.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tieredkv.errors import BudgetError
from tieredkv.memory.limits import host_budget_bytes
from tieredkv.memory.units import different_sizes
from tieredkv.serve.engine.conversations import Conversations
from tieredkv.serve.engine.files import Lock, SessionFiles
from tieredkv.session.video_session import VideoSession


@dataclass(slots=True, eq=False)
class OpenSession:
    """A session that can be asked."""

    key: str
    session: VideoSession
    nbytes_planned: int
    """Host memory that it was planned to take; longer questions may need more."""
    lock: Lock | None = None
    """On the file that it reads, if it was loaded."""
    conversations: Conversations = field(default_factory=Conversations)
    users: int = 0

    @property
    def nbytes(self) -> int:
        """Host memory that it takes."""
        return max(self.nbytes_planned, self.session.host_bytes) + self.conversations.nbytes


@dataclass(frozen=True, slots=True)
class Tier:
    """What one tier holds, for `EngineState`."""

    sessions: int
    nbytes: int
    most_bytes: int


class Sessions:
    """The open sessions of one model, by key. Its methods may be called from any thread, one that opens a session at a
    time."""

    def __init__(self, most_bytes: int, files: SessionFiles | None = None) -> None:
        """most_bytes: of host memory, for all of them. files: None: what leaves host memory is gone."""
        self.most_bytes, self.files = most_bytes, files
        self._lock = threading.RLock()
        self._open: OrderedDict[str, OpenSession] = OrderedDict()
        """The least recently used first."""
        self._coming = 0
        """Bytes of the session that is being opened."""

    # ---- use

    def find(self, key: str) -> OpenSession | None:
        """The open session of this key, from now on the one used last."""
        with self._lock:
            if (found := self._open.get(key)) is not None:
                self._open.move_to_end(key)
            return found

    @contextmanager
    def in_use(self, opened: OpenSession) -> Iterator[None]:
        """Keep a session open inside the block, and keep others off the device. Afterwards caps hold again."""
        with self._lock:
            opened.users += 1
            self._open.move_to_end(opened.key)
        try:
            self.leave_device()
            yield
        finally:
            with self._lock:
                opened.users -= 1
                self.leave_device(but=next(reversed(self._open.values()), None))
                self.settle()

    def leave_device(self, but: OpenSession | None = None) -> None:
        """Free what sessions keep on the device, except `but` and those in use."""
        for opened in self._idle():
            if opened is not but and opened.session.device_bytes:
                opened.session.leave_device()

    def settle(self) -> None:
        """Close what is over the cap after a question, since longer prompts and conversations may have grown it. The
        last session forgets its conversations first."""
        with self._lock:
            while self._taken() > self.most_bytes and (idle := self._idle()):
                if len(idle) == 1 and idle[0].conversations.nbytes:
                    idle[0].conversations.forget()
                else:
                    self._close(idle[0])

    # ---- opening and closing

    def make_room(self, nbytes: int) -> None:
        """Close the least recently used sessions until `nbytes` more of host memory are under the cap. Raises
        `BudgetError`, and closes none, if they cannot be."""
        with self._lock:
            kept = sum(opened.nbytes for opened in self._open.values() if opened.users)
            if nbytes + kept > self.most_bytes:
                needs, allowed = different_sizes(nbytes + kept, self.most_bytes)
                raise BudgetError(
                    f"the session would need {needs} of host memory, and all open sessions may take {allowed}: lower "
                    "fps or max_pixels, ask about a shorter part, or raise --open-gb."
                )
            while self._taken() + nbytes > self.most_bytes:
                self._close(self._idle()[0])

    def expect(self, nbytes: int) -> None:
        """Make room for a session that is being opened, which counts from now on until `add` or `give_up`.

        Sessions are also closed where the machine has no memory left for it. Raises `BudgetError` as `make_room` does.
        """
        with self._lock:
            self._coming = 0
            self.make_room(nbytes)
            while nbytes > host_budget_bytes(None) and (idle := self._idle()):
                self._close(idle[0])
            self._coming = nbytes

    def give_up(self) -> None:
        """The session that was being opened takes no memory."""
        self._coming = 0

    def add(self, opened: OpenSession) -> OpenSession:
        """A session that `expect` has made room for is open."""
        with self._lock:
            self._coming = 0
            self._open[opened.key] = opened
        return opened

    def make_room_on_disk(self, nbytes: int) -> bool:
        """Remove the least recently used files until `nbytes` more are under the cap; returns whether they are.

        Sessions that read such a file are closed, as its blocks are only freed then.
        """
        assert self.files is not None
        while not self.files.make_room(nbytes):
            readers = [opened for opened in self._idle() if opened.lock is not None]
            if nbytes > self.files.most_bytes or not readers:
                return False
            with self._lock:
                self._close(readers[0])
        return True

    def discard(self, opened: OpenSession) -> None:
        """Close a session that cannot be asked any more."""
        with self._lock:
            if self._open.get(opened.key) is opened:
                self._close(opened)

    def close(self) -> None:
        """Close all."""
        with self._lock:
            for opened in list(self._open.values()):
                self._close(opened)

    def _close(self, opened: OpenSession) -> None:
        del self._open[opened.key]
        opened.session.close()
        if opened.lock is not None:
            opened.lock.close()

    # ---- what there is

    def _idle(self) -> list[OpenSession]:
        with self._lock:
            return [opened for opened in self._open.values() if not opened.users]

    def _taken(self) -> int:
        return self._coming + sum(opened.nbytes for opened in self._open.values())

    def tiers(self, cap_bytes: int) -> dict[str, Tier]:
        """What "device", "host" and "disk" hold. cap_bytes: of the device."""
        with self._lock:
            opened = list(self._open.values())
        device = [nbytes for nbytes in (each.session.device_bytes for each in opened) if nbytes]
        stays = [] if self.files is None else self.files.stays()
        return {
            "device": Tier(len(device), sum(device), cap_bytes),
            "host": Tier(len(opened), sum(each.nbytes for each in opened), self.most_bytes),
            "disk": Tier(
                sum(stay.path.suffix == ".tkv" for stay in stays),
                sum(stay.nbytes for stay in stays),
                0 if self.files is None else self.files.most_bytes,
            ),
        }
