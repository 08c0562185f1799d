"""Downloads a video to a temporary file. A video is read more than once, and a session names the hash of its bytes."""

from __future__ import annotations

import os
import shutil
import tempfile
from http.client import HTTPException
from typing import Any
from urllib import error as errors
from urllib import request
from urllib.parse import unquote, urlsplit

from tieredkv.errors import VideoError
from tieredkv.progress import progress_bar
from tieredkv.video.local_file import BLOCK, LocalFile
from tieredkv.video.playlists import names_others
from tieredkv.video.urls import check_url, public_name

TIMEOUT_S = 30.0
"""Seconds without a byte after which a download fails."""


def download(url: str, progress: bool = False) -> LocalFile:
    """Download a URL of http or https, which the user has allowed. progress: show a bar on stderr.

    Redirects are followed to such URLs only. The file is named after the URL without its query and password, which may
    be secret. Raises `VideoError`.
    """
    name = public_name(url)
    try:
        with (
            _open(url) as answer,
            LocalFile.writing(name, unquote(os.path.basename(urlsplit(url).path))) as (file, local),
        ):
            _copy(answer, file, name, progress)
    except errors.HTTPError as error:
        raise VideoError(f"{name}: the server answers {error.code} ({error.reason}).") from None
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{name}: cannot be downloaded ({_why(error)}).") from None
    return local


def _open(url: str) -> Any:
    opener = request.OpenerDirector()  # not build_opener, whose handlers open files and FTP too
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        _Redirects,
    ):
        opener.add_handler(handler())
    opener.addheaders = [("User-Agent", "tieredkv")]
    return opener.open(request.Request(url.replace(" ", "%20")), timeout=TIMEOUT_S)


class _Redirects(request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_url(newurl, allowed=True)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _copy(answer: Any, file: Any, name: str, progress: bool) -> None:
    stated = answer.headers.get("Content-Length", "")
    total, done = int(stated) if stated.isdecimal() else None, 0
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if total is not None and total > free:
        raise VideoError(
            f"{name} has {total / 2**20:,.0f} MiB, and {tempfile.gettempdir()} has {free / 2**20:,.0f} MiB free: set "
            "TMPDIR to a folder with more."
        )
    with progress_bar("download", "B", progress) as move:
        while block := answer.read(BLOCK):
            if not done and names_others(block):
                raise VideoError(f"{name}: not a video file but a web page or a playlist: give the URL of the file.")
            file.write(block)
            done += len(block)
            move(done, total)
    if total is not None and done < total:
        raise VideoError(f"{name}: the download ended after {done:,} of {total:,} bytes: try again.")
    if not done:
        raise VideoError(f"{name}: the server sent nothing.")


def _why(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    if isinstance(inner, TimeoutError):
        return f"nothing came for {TIMEOUT_S:g} s"
    return str(getattr(inner, "strerror", None) or inner or type(inner).__name__)
