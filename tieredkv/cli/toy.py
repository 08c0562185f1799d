"""The bundled toy model: it answers if no model is given, about the films that it knows."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from tieredkv.errors import OptionError, VideoError
from tieredkv.video.urls import is_url

TOY = "tiny"


def model_or_toy(
    model: str | None,
    videos: Iterable[str | PathLike[str]],
    what: str = "the bundled toy model answers",
    skip_unreadable: bool = False,
) -> str:
    """`model`, or if that is None, the toy, which is reported on stderr as `what`.

    Raises `OptionError` if no model is given and one of the videos is a URL or not from `tieredkv demo`, `VideoError`
    if one cannot be read, unless `skip_unreadable`.
    """
    if model is not None:
        return model
    for video in videos:
        try:
            known = not is_url(video) and is_demo_film(Path(video))
        except VideoError:
            if not skip_unreadable:
                raise
            continue
        if not known:
            raise OptionError(
                f"{video}: without -m only the bundled toy model could answer, and it knows only the films of "
                f"`tieredkv demo`: give a model (-m FOLDER or -m HUB_ID), or ask the toy nevertheless with -m {TOY}."
            )
    print(f"tieredkv: no -m: {what}, which knows only the films of `tieredkv demo`.", file=sys.stderr, flush=True)
    return TOY


def is_demo_film(path: Path) -> bool:
    """Whether a video file says that it is one of the toy's films: a tag that `tieredkv demo` writes. Raises
    `VideoError` for a file that cannot be read."""
    from tieredkv.tiny.video import COMMENT
    from tieredkv.video.container import tags
    from tieredkv.video.paths import check_path

    check_path(path)
    return tags(path).get("comment") == COMMENT
