"""A folder of sessions, one file per video, sampling and model, in which a later run finds what it need not ingest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from tieredkv.errors import SessionError
from tieredkv.session import session_file
from tieredkv.session.beside import checkpoint_path, remove_leftover
from tieredkv.session.key import digest, sampling_key
from tieredkv.session.origin import ModelSource, same_subtitles
from tieredkv.session.video_session import VideoSession
from tieredkv.storage import tensor_file
from tieredkv.storage.header import check_target
from tieredkv.video.sampling import Sampling


class SessionFolder:
    """The files are named after the film and a key; what is in a file decides whether it is used.

    Their names may be changed as long as they end in the key.
    """

    def __init__(self, folder: Path, source: ModelSource | None, report: Callable[[str], None]) -> None:
        """Creates the folder. source: of the model, if known. Raises `SessionError` if no file can be written there."""
        self._folder, self._source, self._report = folder, source, report
        self.unsaved = 0
        """Sessions that could not be saved."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SessionError(f"{folder} is no folder for sessions: {error.strerror}.") from None
        check_target(folder / "session.tkv")

    def fill(self, session: VideoSession, video: str | PathLike[str], sampling: Sampling, **asked: Any) -> None:
        """Restore the video from its file, or ingest it and save it. Raises what `VideoSession.ingest` does.

        session: without a video. asked: more arguments of its `ingest`. A file that is damaged or of something else is
        reported and replaced. So is a session that cannot be saved; it can be asked nevertheless. An ingest that was
        interrupted is continued from the checkpoint beside the file.
        """
        with open(video, "rb") as film:
            sha256 = hashlib.file_digest(film, "sha256").hexdigest()
        file = self._file(Path(video), sha256, sampling, session)
        if file.exists():
            try:
                session.restore(_checked(file, session, sha256, sampling))
            except SessionError as error:
                self._report(f"  {str(error).rstrip('.')}: the video is ingested again")
            else:
                remove_leftover(checkpoint_path(file))
                self._report(f"  from {file}")
                return
        try:
            session.ingest(video, sampling, checkpoint=checkpoint_path(file), **asked)
        except SessionError as error:  # another run's, or of a model that has changed: before anything is decoded
            self._report(f"  without a checkpoint: {error}")
            session.ingest(video, sampling, **asked)
        try:
            session.save(file)
        except SessionError as error:
            self.unsaved += 1
            self._report(f"  session not saved: {error}")
        else:
            remove_leftover(checkpoint_path(file))

    def _file(self, video: Path, sha256: str, sampling: Sampling, session: VideoSession) -> Path:
        source = self._source and self._source.as_plain()
        identity: list[Any] = [sha256, sampling_key(sampling), source, session.template.system]
        if sampling.fit:  # which chooses by them
            identity += [session.tiers.gpu_kv_gb, session.tiers.host_kv_gb]
            identity += [] if session.tiers.host_kv_bits is None else [session.tiers.host_kv_bits]
        key = digest(identity)[:16]
        name = f"{video.stem.lstrip('.')[:40]}-{key}.tkv"
        return min(self._folder.glob(f"*-{key}.tkv"), default=self._folder / name)


def _checked(file: Path, session: VideoSession, sha256: str, sampling: Sampling) -> tensor_file.Stored:
    """The file, read whole. Raises `SessionError` if it is damaged, or not about this video and settings."""
    stored = tensor_file.read(file)
    video, bits = session_file.state_of(stored).video, session_file.bits_of(stored)
    saved_as = video.sampling and _as_asked(video.sampling, sampling)
    if saved_as and same_subtitles(stored.manifest, saved_as.subtitles, sampling.subtitles):
        saved_as = replace(saved_as, subtitles=sampling.subtitles)
    for what, saved, asked in (
        ("video", video.facts.sha256, sha256),
        ("sampling", saved_as, sampling),
        ("system prompt", video.system, session.template.system),
        ("size of chunks", stored.manifest["tiers"].get("chunk_tokens"), session.tiers.chunk_tokens),
        ("number of bits", bits, session.tiers.host_kv_bits or bits),
    ):
        if saved != asked:
            raise SessionError(f"{file} was saved with another {what}.")
    stored.verify()
    return stored


def _as_asked(saved: Sampling, asked: Sampling) -> Sampling:
    """The saved sampling without what `fit` chose, if that was asked for."""
    if "fit" not in asked.given():
        return saved
    free = [name for name in ("fps", "max_pixels") if getattr(asked, name) is None]
    return replace(saved, **{name: getattr(asked, name) for name in (*free, "fit")})
