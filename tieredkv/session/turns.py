"""Turns: one call at a time uses a session, in order, and none after its end or in the wrong process."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import AbstractContextManager

from tieredkv.environment import forking
from tieredkv.errors import TieredKVError
from tieredkv.session.job import Job


class Turns:
    """A session's lock, the jobs that wait for it, and whether the session can still be used."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.line: deque[Job] = deque()
        """Jobs that began and have not ended, in order. The first has the turn."""
        self.closed = False
        self._torn = False
        """Whether the process was forked while another thread was using the session."""
        forking.follow(self)

    def check_open(self, device: str) -> None:
        """Raise `TieredKVError` if the session cannot be used in this process, or not on this type of device."""
        if self.closed:
            raise TieredKVError("this session is closed: open another.")
        if self._torn:
            raise TieredKVError(
                "the process was forked while this session was at work in another thread: open or load it again here."
            )
        forking.enter(device)

    def close(self) -> None:
        """Let no call begin from now on, and no answer be completed."""
        self.closed = True

    def take(self, job: Job | None) -> AbstractContextManager[object]:
        """Hold the lock inside the block. job: waits for the jobs before it, and can be stopped meanwhile."""
        return self.lock if job is None else job.turn(self.lock)

    def check_still_wanted(self, job: Job | None) -> None:
        """Raise if a job's answer is no longer wanted. Without a job a caller waits for it, so it always is."""
        if job is not None:
            job.check()
            if self.closed:
                raise TieredKVError("the session was closed before the answer was complete.")

    def after_fork(self) -> None:
        """Replace the lock in a forked process, where the thread that would release the old one is missing."""
        self._torn = self._torn or not self.lock.acquire(blocking=False)
        self.lock = threading.RLock()
        self.line.clear()
