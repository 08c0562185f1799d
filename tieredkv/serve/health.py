"""`GET /health`, for whoever watches the server, and `GET /v1/tieredkv`: what a page must know before it asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from tieredkv import __version__
from tieredkv.memory.units import GIB

router = APIRouter()


@dataclass(frozen=True, slots=True)
class Demo:
    """The film that a toy knows, among the uploads."""

    file_id: str
    questions: tuple[str, ...]


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(request: Request) -> JSONResponse:
    """200 while requests are taken, 503 once the server is stopping. Says how many wait, and nothing of anybody."""
    state = request.app.state.engine.snapshot()
    status = "stopping" if state.stopping else "ok"
    body = {"status": status, "waiting": state.waiting, "running": state.running}
    return JSONResponse(body, 503 if state.stopping else 200)


@router.get("/v1/tieredkv")
async def about(request: Request) -> dict[str, Any]:
    """The model, whether it is the toy, the toy's film, and the limits of films."""
    state = request.app.state
    settings, demo = state.settings, getattr(state, "demo", None)
    return {
        "model": state.engine.model_name,
        "toy": settings.model is None,
        "demo": None if demo is None else {"file_id": demo.file_id, "questions": list(demo.questions)},
        "version": __version__,
        "key_needed": bool(settings.api_keys),
        "limits": {
            "upload_bytes": int(settings.upload_gb * GIB),
            "body_bytes": int(settings.body_mb * 2**20),
            "video_seconds": settings.video_hours * 3600,
            "max_new_tokens": settings.max_new_tokens,
            "queue": settings.queue,
            "timeout": settings.timeout,
        },
    }
