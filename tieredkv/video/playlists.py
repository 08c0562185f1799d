"""Files that are no films themselves, but would make FFmpeg read other files or URLs."""

from __future__ import annotations

_BEGINNINGS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"<!DOCTYPE", b"<html", b"<HTML", b"<!doctype")


def names_others(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a playlist or a web page."""
    return head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(_BEGINNINGS)
