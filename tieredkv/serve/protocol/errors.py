"""Errors of requests as clients see them: OpenAI's shape, one sentence each."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from tieredkv.errors import TieredKVError
from tieredkv.serve.errors import ApiError, api_error
from tieredkv.serve.protocol.reading import ClientGone

log = logging.getLogger("tieredkv.serve")


LONGEST = 1000
"""Characters of a message."""


def install(app: FastAPI) -> None:
    """Make an application report every error in OpenAI's shape."""
    app.add_exception_handler(ApiError, _reported)
    app.add_exception_handler(TieredKVError, _reported)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(Exception, _unexpected)


def failed(error: BaseException) -> ApiError:
    """What a client is told of an error; the log says what it is not told."""
    shown = api_error(error)
    if shown is not error and shown.status >= 500:
        log.error("A request failed.", exc_info=error)
    # Messages repeat what a request said, which may be long.
    shown.message = _clipped(shown.message, LONGEST)
    shown.param = None if shown.param is None else _clipped(shown.param, LONGEST // 4)
    return shown


def response(error: BaseException) -> JSONResponse:
    """The reply to a request that failed."""
    shown = failed(error)
    return JSONResponse(shown.body(), shown.status, shown.headers())


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this reply; 499 is what proxies log."""
    return Response(status_code=499)


async def _reported(request: Request, error: Exception) -> JSONResponse:
    return response(error)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    """Starlette raises the error once more after this reply; uvicorn then logs it and closes the connection."""
    shown = api_error(error)
    return JSONResponse(shown.body(), shown.status, {"Connection": "close"})


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        message, code = f"there is nothing at {path}: see docs/serving.md for what this server answers to.", "not_found"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message, code = f"{path} does not take {request.method}: use {allowed}.", "method_not_allowed"
    else:
        message, code = f"the request cannot be read ({error.detail}): send JSON.", "bad_request"
    shown = ApiError(error.status_code, message, code=code)
    return JSONResponse(shown.body(), shown.status, error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return response(_first_fault(error.errors()))


def _first_fault(faults: Any) -> ApiError:
    """One sentence about the first thing that pydantic found wrong."""
    fault = faults[0]
    where = _path(fault["loc"])
    if fault["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON ({fault['ctx']['error']}): send one JSON object.", code="bad_json")
    if not where:
        return ApiError(
            400, "the body is not a JSON object: send one, with Content-Type: application/json.", code="bad_json"
        )
    if fault["type"] == "missing":
        return ApiError(400, f"{where} is missing: give it.", code="missing", param=where)
    if fault["type"] == "extra_forbidden":
        return ApiError(
            400, f"{where} is not a field of this request: leave it out.", code="unknown_field", param=where
        )
    want = fault["msg"].removeprefix("Value error, ")
    given = _short(fault.get("input"))
    return ApiError(400, f"{where}={given} is not valid: {want[:1].lower()}{want[1:]}.", code="bad_value", param=where)


def _path(location: Any) -> str:
    """Where a value is, as one would write it: `messages[0].content`."""
    parts = [part for part in location if part not in ("body", "query", "path", "header")]
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _short(value: Any) -> str:
    return _clipped(repr(value), 60)


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
