"""Objects and events of one reply of `/v1/responses`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from tieredkv.serve.asked import Answer, Piece, Progress
from tieredkv.serve.protocol import events
from tieredkv.serve.protocol.errors import failed
from tieredkv.serve.protocol.question import Question
from tieredkv.serve.protocol.reading import Reading
from tieredkv.serve.protocol.reply import additions, cached_tokens

if TYPE_CHECKING:
    from tieredkv.serve.errors import ApiError


class ResponseReply:
    """What of a response is known, as it goes on. Its id is that of the conversation up to it."""

    def __init__(self, model: str, asked: Any, question: Question) -> None:
        """asked: the request."""
        self._question = question
        self.message_id = f"msg_{uuid.uuid4().hex}"
        self._common = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": asked.instructions,
            "previous_response_id": asked.previous_response_id,
            "max_output_tokens": question.options["max_new_tokens"],
            "metadata": asked.metadata or {},
            "store": asked.store is not False,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "text": {"format": {"type": "text"}},
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": False,
            "truncation": "disabled",
        }

    def state(self, status: str, **more: Any) -> dict[str, Any]:
        """The response before its end, or after an error."""
        empty: dict[str, Any] = {"error": None, "incomplete_details": None, "output": [], "usage": None}
        return {**self._common, "status": status, **empty, **more}

    def complete(self, answer: Answer) -> dict[str, Any]:
        """The response with its answer."""
        stats, cut = answer.generation.stats, answer.finish_reason == "length"
        usage = {
            "input_tokens": stats.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached_tokens(answer)},
            "output_tokens": stats.new_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": stats.prompt_tokens + stats.new_tokens,
        }
        return self.state(
            "incomplete" if cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            output=[self.message("incomplete" if cut else "completed", [self.part(answer.generation.text)])],
            usage=usage,
            tieredkv=additions(answer, self._question.media),
        )

    def failed(self, error: ApiError) -> dict[str, Any]:
        """The response after an error."""
        return self.state("failed", error={"code": error.code or "server_error", "message": error.message})

    def message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        """The one item of the output."""
        return {"id": self.message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def part(self, text: str) -> dict[str, Any]:
        """The one part of the message."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    @property
    def shows_progress(self) -> bool:
        """Whether progress is streamed as events of its own."""
        return self._question.additions.progress


class _Numbered:
    """Events with numbers in their order."""

    def __init__(self) -> None:
        self._number = 0

    def __call__(self, kind: str, **fields: Any) -> bytes:
        event = events.data({"type": kind, "sequence_number": self._number, **fields}, kind)
        self._number += 1
        return event


async def response_events(
    reading: Reading[Any], first: Any, reply: ResponseReply, complete: Callable[[Answer], dict[str, Any]]
) -> AsyncGenerator[bytes, None]:
    """The stream of a response. complete: makes the whole response of its answer, and stores it."""
    event, numbered, begun = first, _Numbered(), False
    at = {"item_id": reply.message_id, "output_index": 0, "content_index": 0}
    yield numbered("response.created", response=reply.state("in_progress"))
    yield numbered("response.in_progress", response=reply.state("in_progress"))
    try:
        while True:
            if isinstance(event, Piece | Answer) and not begun:
                begun = True
                item = reply.message("in_progress", [])
                yield numbered("response.output_item.added", output_index=0, item=item)
                yield numbered("response.content_part.added", **at, part=reply.part(""))
            if isinstance(event, Piece):
                yield numbered("response.output_text.delta", **at, delta=event.text, logprobs=[])
            elif isinstance(event, Answer):
                text, body = event.generation.text, complete(event)
                yield numbered("response.output_text.done", **at, text=text, logprobs=[])
                yield numbered("response.content_part.done", **at, part=reply.part(text))
                yield numbered("response.output_item.done", output_index=0, item=body["output"][0])
                yield numbered(f"response.{body['status']}", response=body)
                return
            elif isinstance(event, Progress) and reply.shows_progress:
                yield numbered("tieredkv.progress", progress=events.progress_of(event))
            else:
                yield events.progress_comment(event)
            event = await reading.next(events.QUIET_S)
    except Exception as error:  # noqa: BLE001  the status is sent already: the client finds the error in the stream
        shown = failed(error)
        yield numbered("error", code=shown.code, message=shown.message, param=shown.param)
        yield numbered("response.failed", response=reply.failed(shown))
