"""Serves the page's files, each by its exact name, with a policy that forbids everything the page does not need."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse

FOLDER = Path(__file__).with_name("static")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {path.name: path for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
"""All that is ever served: a request's name is looked up here and is never part of a path."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again with its ETag, so that an update is seen at once
}

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def index() -> FileResponse:
    """The page."""
    return _file("index.html")


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def part(name: str) -> FileResponse:
    """A style sheet, script or icon of the page."""
    if name not in FILES:
        raise HTTPException(404, f"The page has no file {name!r}.")
    return _file(name)


def _file(name: str) -> FileResponse:
    path = FILES[name]
    return FileResponse(path, media_type=TYPES[path.suffix], headers=HEADERS)
