"""A session for a command: a saved one, or that of a video, which may then be saved."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tieredkv.cli.checks import refuse_session
from tieredkv.cli.options import model_path, typed
from tieredkv.cli.process import quick_imports
from tieredkv.cli.toy import model_or_toy
from tieredkv.errors import OptionError, SessionError
from tieredkv.models.prompts import check_system
from tieredkv.models.quantising import check_package, check_weights
from tieredkv.models.sources import check_source, is_local
from tieredkv.progress import note, spans_text
from tieredkv.session import conversation_file, origin
from tieredkv.session.beside import check_free, checkpoint_path, remove_leftover
from tieredkv.session.manifest import read_manifest
from tieredkv.storage import header
from tieredkv.video.media import check_subtitles, media_of
from tieredkv.video.paths import check_path
from tieredkv.video.sampling import Sampling

if TYPE_CHECKING:
    from tieredkv.session.video_session import VideoSession


@contextmanager
def opened(
    context: typer.Context,
    model: str | None,
    videos: Sequence[str | PathLike[str]],
    saved: Path | None,
    *,
    tiers: dict[str, Any],
    sampling: dict[str, Any],
    system: str | None = None,
    weights: str | None = None,
    **asked: Any,
) -> Iterator[tuple[VideoSession, SessionError | None]]:
    """Yields the session, and why it could not be saved, or None.

    context: of the command. videos: files of videos and pictures. saved: a file to load, or to write if it does not
    exist. model, weights, tiers, sampling: the options given. A saved session names its model and keeps its own
    sampling: what the command line itself gives must agree, and values from the environment are ignored. system: the
    system prompt. asked: `question` and `max_new_tokens` if known, for the check of the budget.
    """
    check_system(system)
    for video in videos:
        refuse_session(str(video))
    given: Any = list(videos) if len(videos) > 1 else videos[0] if videos else None
    if saved is not None and is_there(saved):
        manifest = read_manifest(saved)
        origin.check_sampling(saved, manifest, typed(context, sampling))
        if model is None or (not typed(context, {"model": model}) and origin.named_model(manifest) is not None):
            origin.model_of(saved, manifest)  # raises at once if it is gone
            model = None
        weights = typed(context, {"weights": weights}).get("weights")
        check_model(model, origin.weights_of(saved, manifest, weights))
        for video in videos:
            check_path(video)
        named = model and model_path(model)
        note(f"loading the model of {saved}" if model is None else f"loading {model}")
        with quick_imports():
            from tieredkv import api
        with api.load_session(saved, named, weights=weights, video=given, system=system, **tiers) as session:
            remove_leftover(checkpoint_path(saved))
            report_damage(session)
            yield session, None
        return
    if not videos:
        missing = "give a video and a question" if saved is None else f"{saved}: no such file; give a video too"
        raise OptionError(f"there is no video to ask about: {missing}.")
    frames = Sampling(**sampling)
    for video in videos:
        check_path(video)
    check_subtitles(media_of(given), frames)
    check_model(model, weights)
    checkpoint = None
    if saved is not None:
        header.check_target(saved)
        conversation_file.check(saved)
        checkpoint = checkpoint_path(saved) if len(videos) == 1 else None
    if checkpoint is not None:
        check_free(checkpoint)
    model = model_or_toy(model, videos)
    note(f"loading {model}")
    with quick_imports():
        from tieredkv import api
    with api.new_session(model_path(model), weights=weights, progress=True, system=system, **tiers) as session:
        say_default_cap(session)
        note(f"opening {', '.join(map(str, videos))}")
        session.ingest(given, frames, checkpoint=checkpoint, save_to=saved, **asked)
        report_damage(session)
        unsaved: SessionError | None = None
        if saved is not None:
            try:
                if is_there(saved):
                    raise SessionError(f"{saved} was written by another program meanwhile, and is not overwritten.")
                session.save(saved)
            except SessionError as error:  # the question can be answered nevertheless
                unsaved = error
        yield session, unsaved


def check_model(model: str | None, weights: str | None) -> None:
    """Raise a `TieredKVError` for what `--model` and `--weights` cannot be, before anything is loaded."""
    check_weights(weights)
    check_package(weights)
    check_place(model)


def check_place(model: str | None) -> None:
    """Raise `UnsupportedModelError` if `--model` names a path without a model, or a hub id that cannot be reached."""
    if model is not None and model != "tiny":
        check_source(model_path(model))
        is_local(model_path(model))


def say_default_cap(session: VideoSession) -> None:
    """Report on stderr the cap that follows from the card, if none was given."""
    if session.default_cap is not None:
        print(f"tieredkv: {session.default_cap}", file=sys.stderr)


def report_damage(session: VideoSession) -> None:
    """Say on stderr which seconds of the video could not be read."""
    for medium in session.media:
        if medium.damaged:
            of = f" of {medium.facts.name}" if len(session.media) > 1 else ""
            spans = spans_text(medium.damaged)
            print(f"tieredkv: could not be read{of}: {spans}; the picture before is shown there.", file=sys.stderr)


def is_there(path: Path) -> bool:
    """Whether anything exists at a path. Raises `OptionError` for an invalid path."""
    try:
        return path.exists()
    except OSError as error:
        raise OptionError(f"{str(path)[:80]}: not a file name ({error.strerror}).") from None
