"""`GET /v1/models`: the one model that is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from tieredkv.serve.asked import Engine
from tieredkv.serve.errors import ApiError

router = APIRouter()


def described(engine: Engine) -> dict[str, Any]:
    """The model as OpenAI's clients know models."""
    return {"id": engine.model_name, "object": "model", "created": engine.created, "owned_by": "tieredkv"}


def check_model(name: str | None, engine: Engine) -> None:
    """Raise `ApiError` if a request names another model than the one that is served; None names none."""
    if name not in (None, engine.model_name):
        raise ApiError(
            404,
            f"the model {name!r} is not served here: use {engine.model_name!r}.",
            code="model_not_found",
            param="model",
        )


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All models, of which there is one."""
    return {"object": "list", "data": [described(request.app.state.engine)]}


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    """The model of that name. Names of the hub have slashes in them."""
    check_model(name, request.app.state.engine)
    return described(request.app.state.engine)
