"""Opening: a session on its way into memory, loaded from its file or ingested and saved."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tieredkv.errors import SessionError, TieredKVError, VideoError
from tieredkv.memory.units import GIB
from tieredkv.serve.asked import Shown
from tieredkv.serve.engine.files import Lock
from tieredkv.serve.engine.sessions import OpenSession, Sessions
from tieredkv.session import session_file
from tieredkv.session.beside import checkpoint_path, remove_leftover
from tieredkv.session.video_session import VideoSession
from tieredkv.storage import tensor_file
from tieredkv.video.sampling import Sampling

log = logging.getLogger(__name__)

Report = Callable[[Literal["ingest", "load"], int, int | None], None]
"""Called with the stage, the tokens that are cached, and how many are expected."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A session that is to be opened."""

    key: str
    media: tuple[Shown, ...]
    source: Callable[[Shown], Any]
    """Gives the `Video` or `Picture` to ingest."""
    question: str
    options: dict[str, Any]
    """Of the question that budgets must allow for."""

    @property
    def sampling(self) -> Sampling:
        """What holds for all of them; the rest is what `source` gives."""
        return Sampling(fit=any(shown.sampling.fit for shown in self.media))


class Opening:
    """Opens one session; `run` on a thread of its own, `stop` from any."""

    def __init__(self, wanted: Wanted, session: VideoSession, sessions: Sessions, report: Report) -> None:
        """session: without a video. report: called on the thread of `run`."""
        self._wanted, self._session, self._sessions, self._report = wanted, session, sessions, report
        self._lock: Lock | None = None
        self._nbytes = self._file_bytes = self._done = 0
        self._stopped = self._complete = False
        """At most one of them is ever true."""
        self._ending = threading.Lock()

    def stop(self) -> None:
        """End at the next chunk, without waiting; `run` then raises a `TieredKVError`. A session that only has to be
        saved is not stopped: it is kept for later questions."""
        with self._ending:
            if not self._complete:
                self._stopped = True
                self._session.stop()

    def run(self) -> tuple[OpenSession, bool]:
        """The session, open, and whether it was on disk. Raises what `VideoSession.ingest` does; nothing is then left
        in memory."""
        sessions, key = self._sessions, self._wanted.key
        try:
            sessions.leave_device()
            files = sessions.files
            file = None if files is None else files.name(key, self._wanted.media[0].film.name)
            loaded = file is not None and file.exists() and self._load(file)
            if not loaded:
                self._ingest(file)
            self._check_wanted()
            if file is not None and not loaded:
                self._save(file)
            return sessions.add(OpenSession(key, self._session, self._nbytes, self._lock)), loaded
        except BaseException:
            sessions.give_up()
            self._session.close()
            if self._lock is not None:
                self._lock.close()
            raise

    def _check_wanted(self) -> None:
        """Raise if it was stopped; otherwise it no longer can be."""
        with self._ending:
            if self._stopped:  # the session takes no questions
                raise TieredKVError("nobody waits for this session any more.")
            self._complete = True

    # ---- from disk

    def _load(self, file: Path) -> bool:
        """Restore the session from its file; returns False, and says why in the log, if the file is of no use."""
        assert self._sessions.files is not None
        self._lock = self._sessions.files.use(file)
        if self._lock is None:
            return False
        self._report("load", 0, None)
        try:
            stored = tensor_file.read(file)
            self._check_content(stored)
            most = self._session.tiers.host_kv_gb
            self._nbytes = stored.nbytes if most is None else min(stored.nbytes, int(most * GIB))
            self._sessions.expect(self._nbytes)
            for name in stored.names:
                if self._stopped:
                    raise TieredKVError("nobody waits for this session any more.")
                stored.verify(name, keep=most is None)
            self._session.restore(stored)
        except SessionError as error:
            log.warning("%s The film is ingested again.", error)
            self._sessions.give_up()
            self._lock.close()
            self._lock = None
            return False
        remove_leftover(checkpoint_path(file))
        return True

    def _check_content(self, stored: tensor_file.Stored) -> None:
        """Raise `SessionError` if the file is not about these films. Its model is checked when it is restored."""
        video, session = session_file.state_of(stored).video, self._session
        bits = session_file.bits_of(stored)
        for what, saved, wanted in (
            ("films", [(each.kind, each.facts.sha256) for each in video.media], self._films()),
            ("system prompt", video.system, session.template.system),
            ("size of chunks", stored.manifest["tiers"].get("chunk_tokens"), session.tiers.chunk_tokens),
            ("number of bits", bits, session.tiers.host_kv_bits or bits),
        ):
            if saved != wanted:
                raise SessionError(f"{stored.path} was saved with another {what}.")

    def _films(self) -> list[tuple[str, str]]:
        return [(shown.film.kind, shown.film.sha256) for shown in self._wanted.media]

    # ---- anew

    def _ingest(self, file: Path | None) -> None:
        wanted, session = self._wanted, self._session
        checkpoint = None if file is None or len(wanted.media) > 1 else checkpoint_path(file)
        options: dict[str, Any] = {
            "question": wanted.question,
            "max_new_tokens": session.new_tokens(wanted.options),
            "report": self._progress,
            "make_room": self._make_room,
        }
        self._report("ingest", 0, None)
        films = [wanted.source(shown) for shown in wanted.media]
        try:
            session.ingest(films, wanted.sampling, checkpoint=checkpoint, **options)
        except SessionError as error:
            if checkpoint is None or self._done:
                raise
            log.warning("A film is ingested without a checkpoint: %s", error)  # it is another server's
            session.ingest(films, wanted.sampling, **options)
        if [(each.kind, each.facts.sha256) for each in session.media] != self._films():
            raise VideoError(f"{wanted.media[0].film.name}: the file was changed while it was read: send it again.")

    def _progress(self, done: int, total: int | None) -> None:
        self._done = done
        self._report("ingest", done, total)

    def _make_room(self, host_bytes: int, file_bytes: int) -> None:
        self._nbytes, self._file_bytes = host_bytes, file_bytes
        self._sessions.expect(host_bytes)
        if self._sessions.files is not None:
            self._sessions.make_room_on_disk(2 * file_bytes)  # with a checkpoint beside it

    def _save(self, file: Path) -> None:
        """Without a file the session is answered from all the same, as long as it is in memory."""
        files = self._sessions.files
        assert files is not None
        try:
            if not self._sessions.make_room_on_disk(self._file_bytes):
                raise SessionError(f"{file} does not fit under --sessions-gb.")
            self._session.save(file)
            remove_leftover(checkpoint_path(file))
        except (TieredKVError, OSError) as error:
            log.warning("A session is not kept on disk: %s", error)
