"""Errors in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from tieredkv.errors import TieredKVError


class ApiError(Exception):
    """An error with the HTTP status that a client is to see."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """message: one sentence, what was wrong and what to do. code: a stable word for programs. param: the field of
        the request that is at fault. retry_after: seconds."""
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """What is sent, as JSON."""
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Of the reply."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return {**headers, "WWW-Authenticate": "Bearer"} if self.status == 401 else headers


def _type(status: int) -> str:
    """OpenAI's name for errors of this status."""
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def api_error(error: BaseException) -> ApiError:
    """The error that a client sees for any error of a request. What the user cannot change is not described."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TieredKVError):
        return ApiError(400, str(error), code=type(error).__name__.removesuffix("Error").lower())
    return ApiError(500, "the server failed to answer this request: its log says why.", code="internal")
