"""A session for a command: a saved one taken up, or a video ingested, and saved where that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tieredkv import api
from tieredkv.cli.options import model_path
from tieredkv.errors import OptionError, SessionError
from tieredkv.session.video_session import VideoSession
from tieredkv.storage import tensor_file
from tieredkv.video.frames import Sampling, check_video


@contextmanager
def opened(
    model: str,
    video: str | None,
    saved: Path | None,
    *,
    tiers: dict[str, Any],
    sampling: dict[str, Any],
    typed: list[str],
    **asked: Any,
) -> Iterator[tuple[VideoSession, SessionError | None]]:
    """The session, and why it could not be saved, or None.

    saved: a file to take up, or to write if there is none. tiers, sampling: options that are given. typed: which
    options of sampling stand on the command line; a saved session keeps its own, so there they are refused, and what
    the environment says of them is left aside. asked: `question` and `max_new_tokens` where they are known, for the
    check that the budget suffices.
    """
    if saved is not None and is_there(saved):
        if typed:
            raise OptionError(f"{saved} is saved as it was sampled: leave out {typed[0]}.")
        with api.load_session(saved, model_path(model), video=video, **tiers) as session:
            yield session, None
        return
    if video is None:
        missing = "give a video and a question" if saved is None else f"{saved}: no such file; give a video too"
        raise OptionError(f"there is no video to ask about: {missing}.")
    frames = Sampling(**sampling)
    check_video(video)
    if saved is not None:
        tensor_file.check_target(saved)
    with api.new_session(model_path(model), progress=True, **tiers) as session:
        session.ingest(video, frames, **asked)
        unsaved: SessionError | None = None
        if saved is not None:
            try:
                if is_there(saved):
                    raise SessionError(f"{saved} was written by somebody else meanwhile: not saved over it.")
                session.save(saved)
            except SessionError as error:  # what was ingested is worth an answer all the same
                unsaved = error
        yield session, unsaved


def is_there(path: Path) -> bool:
    """Whether there is anything at a path. Raises `OptionError` for what is no path."""
    try:
        return path.exists()
    except OSError as error:
        raise OptionError(f"{str(path)[:80]}: not a file name ({error.strerror}).") from None
