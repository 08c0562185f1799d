"""`POST /v1/chat/completions`, whole and streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from tieredkv.serve.asked import Answer, Piece, Progress
from tieredkv.serve.protocol import conversation, events
from tieredkv.serve.protocol.errors import failed
from tieredkv.serve.protocol.generation import Additions, GenerationFields
from tieredkv.serve.protocol.models import check_model
from tieredkv.serve.protocol.question import Question, client_of, events_of
from tieredkv.serve.protocol.reading import Reading, unless_gone
from tieredkv.serve.protocol.refused import CHAT, check_fields
from tieredkv.serve.protocol.reply import additions, cached_tokens
from tieredkv.serve.protocol.sampling import read_kwargs

router = APIRouter()


class StreamOptions(BaseModel):
    """How a stream is sent. Other servers' options are left out."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None


class ChatRequest(GenerationFields):
    """The fields that work; see `refused` for the others."""

    messages: list[Any]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream_options: StreamOptions | None = None


def question_of(asked: ChatRequest, request: Request) -> Question:
    """What a request asks. Raises `ApiError` for what does not work, before anything is fetched."""
    state = request.app.state
    check_model(asked.model, state.engine)
    check_fields(asked.model_extra or {}, CHAT, ChatRequest.model_fields)
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    return Question(
        conversation=conversation.read(asked.messages),
        sampling=read_kwargs(asked.media_io_kwargs, asked.mm_processor_kwargs),
        options=asked.options(state.settings, most),
        stops=asked.stops(),
        additions=asked.tieredkv or Additions(),
        client=client_of(request),
    )


@router.post("/v1/chat/completions")
async def complete(asked: ChatRequest, request: Request) -> Response:
    """Answer the last message of a conversation."""
    question = question_of(asked, request)
    reading = Reading(events_of(request.app.state, question))
    reply = _Reply(request.app.state.engine.model_name, question)
    if not asked.stream:
        return await whole(reading, request, reply.whole)
    usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
    return await streamed(reading, request, lambda first: _chunks(reading, first, reply, usage))


async def whole(reading: Reading[Any], request: Request, reply: Any) -> Response:
    """The reply once the answer is there. reply: makes its JSON of the `Answer`."""

    async def answer() -> Answer:
        while True:
            event = await reading.next()
            if isinstance(event, Answer):
                return event

    try:
        return JSONResponse(reply(await unless_gone(request.receive, answer())))
    finally:
        await reading.stop()


async def streamed(reading: Reading[Any], request: Request, chunks: Any) -> Response:
    """A reply that begins with the first event, so that a refusal still has a status of its own.

    chunks: makes the stream, of its first event and those that follow in `reading`.
    """
    try:
        first = await unless_gone(request.receive, reading.next())
    except BaseException:
        await reading.stop()
        raise
    return events.EventStream(chunks(first), reading.stop)


class _Reply:
    """Objects of one reply, which share an id."""

    def __init__(self, model: str, question: Question) -> None:
        self._question = question
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.generation.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage_of(answer),
            "tieredkv": additions(answer, self._question.media),
        }

    def chunk(self, delta: dict[str, Any] | None, finish: str | None = None, **more: Any) -> dict[str, Any]:
        """A chunk of a stream; without a delta, one without choices."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        choices = [] if delta is None else [choice]
        return {**self._common, "object": "chat.completion.chunk", "choices": choices, **more}

    def last(self, answer: Answer, **more: Any) -> dict[str, Any]:
        return self.chunk({}, answer.finish_reason, tieredkv=additions(answer, self._question.media), **more)

    @property
    def shows_progress(self) -> bool:
        return self._question.additions.progress


def usage_of(answer: Answer) -> dict[str, Any]:
    """Tokens, in OpenAI's words."""
    stats = answer.generation.stats
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.new_tokens,
        "total_tokens": stats.prompt_tokens + stats.new_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens(answer)},
    }


async def _chunks(reading: Reading[Any], first: Any, reply: _Reply, usage: bool) -> AsyncGenerator[bytes, None]:
    """The stream. The role comes with the first text: clients take its time for the time to the first token."""
    none = {"usage": None} if usage else {}
    begun = False
    event = first
    try:
        while True:
            if isinstance(event, Piece | Answer) and not begun:
                begun = True
                yield events.data(reply.chunk({"role": "assistant", "content": ""}, **none))
            if isinstance(event, Piece):
                yield events.data(reply.chunk({"content": event.text}, **none))
            elif isinstance(event, Answer):
                yield events.data(reply.last(event, **none))
                if usage:
                    yield events.data(reply.chunk(None, usage=usage_of(event)))
                yield events.DONE
                return
            elif isinstance(event, Progress) and reply.shows_progress:
                yield events.data(reply.chunk(None, tieredkv={"progress": events.progress_of(event)}, **none))
            else:
                yield events.progress_comment(event)
            event = await reading.next(events.QUIET_S)
    except Exception as error:  # noqa: BLE001  the status is sent already: the client finds the error in the stream
        yield events.data(failed(error).body())
