"""Which URLs may be opened as a video."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from tieredkv.errors import VideoError

_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


def is_url(video: object) -> bool:
    """Whether this is text such as "https://example.org/film.mp4"."""
    return isinstance(video, str) and _URL.match(video) is not None


def check_url(url: str, allowed: bool) -> None:
    """Raise `VideoError` unless URLs are allowed and this is one of http or https."""
    match = _URL.match(url)
    scheme = match[1].lower() if match else ""
    if scheme not in ("http", "https"):
        raise VideoError(f"{url[:80]}: only http and https URLs can be opened, not {scheme}: download it to a file.")
    if allowed is not True:
        raise VideoError(
            f"{url[:80]} is a URL, which is downloaded only with allow_url=True (--allow-url): give that, or a file."
        )


def public_name(url: str) -> str:
    """The URL without its query, its fragment and its user, which may be secret. Raises `VideoError` if it is none."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise VideoError(f"{url[:80]}: not a URL ({error}).") from None
    return f"{parts.scheme.lower()}://{f'[{host}]' if ':' in host else host}{f':{port}' if port else ''}{parts.path}"
