"""Server-sent events, as every client of OpenAI's protocol reads them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from fastapi.sse import format_sse_event
from starlette.responses import Response

from tieredkv.serve.asked import Progress
from tieredkv.serve.protocol.reading import ClientGone, unless_gone

QUIET_S = 10.0
"""Seconds without an event after which a comment shows that the connection is alive."""
DONE = b"data: [DONE]\n\n"
"""Ends a stream of chat completions."""
_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})
"""Raw in JSON, and in events no ends of lines, but many clients split text there, `httpx` among them."""


def data(value: Any, event: str | None = None) -> bytes:
    """An event with JSON as its data."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return format_sse_event(data_str=text.translate(_LINE_ENDS), event=event)


def comment(text: str) -> bytes:
    """What every client leaves out."""
    return format_sse_event(comment=text)


def progress_of(progress: Progress) -> dict[str, Any]:
    """Progress as JSON."""
    return {
        "stage": progress.stage,
        "done": progress.done,
        "total": progress.total,
        "seconds": round(progress.seconds, 3),
    }


def progress_comment(progress: Progress | None) -> bytes:
    """The same for people who look at the stream; None: nothing new."""
    if progress is None:
        return comment("still at work")
    total = "" if progress.total is None else f"/{progress.total}"
    return comment(f"{progress.stage} {progress.done}{total} {progress.seconds:.1f} s")


class EventStream(Response):
    """A reply that is sent as it comes. A client that closes its connection stops it at once."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], stop: Callable[[], Awaitable[None]]) -> None:
        """chunks: closed at the end, whatever happens; then `stop` is called."""
        # Proxies otherwise collect what is sent.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._stop = chunks, stop

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI has it."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await unless_gone(receive, self._send(send))
        except ClientGone:
            return
        finally:
            await self._stop()

    async def _send(self, send: Any) -> None:
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
