"""`/v1/responses`: answers that a later request may continue by their id."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from tieredkv.serve.asked import Answer
from tieredkv.serve.errors import ApiError
from tieredkv.serve.protocol import conversation
from tieredkv.serve.protocol.chat import streamed, whole
from tieredkv.serve.protocol.conversation import Conversation
from tieredkv.serve.protocol.conversations import Conversations, Kept
from tieredkv.serve.protocol.generation import Additions, GenerationFields
from tieredkv.serve.protocol.models import check_model
from tieredkv.serve.protocol.question import Question, client_of, events_of
from tieredkv.serve.protocol.reading import Reading
from tieredkv.serve.protocol.refused import NO_LOGPROBS, RESPONSES, check_fields
from tieredkv.serve.protocol.response_reply import ResponseReply, response_events
from tieredkv.serve.protocol.sampling import read_kwargs

router = APIRouter()


class ResponsesRequest(GenerationFields):
    """The fields that work; see `refused` for the others."""

    input: str | list[Any]
    instructions: str | None = None
    """Of this response alone: they are not kept with the conversation."""
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, str] | None = None
    include: list[Any] | None = None
    """Other things than an answer; there are none here."""


def _messages(asked: ResponsesRequest) -> list[Any]:
    """The input as messages."""
    if isinstance(asked.input, str):
        return [{"role": "user", "content": asked.input}]
    for i, item in enumerate(asked.input):
        kind = item.get("type", "message") if isinstance(item, dict) else "message"
        if kind != "message":
            raise ApiError(
                400,
                f"input[{i}]: items of type {str(kind)[:60]} are not supported: give messages with role and content.",
                code="unsupported",
                param=f"input[{i}].type",
            )
    return asked.input


def _earlier(asked: ResponsesRequest, conversations: Conversations, client: str) -> Kept | None:
    name = asked.previous_response_id
    return None if name is None else conversations.find(name, client, "previous_response_id")


def question_of(asked: ResponsesRequest, request: Request) -> tuple[Question, str | None]:
    """What a request asks, and the system text that is kept with its conversation. Raises `ApiError` for what does not
    work, before anything is fetched."""
    state, client = request.app.state, client_of(request)
    check_model(asked.model, state.engine)
    if "message.output_text.logprobs" in (asked.include or ()):
        raise ApiError(400, f"include: logprobs {NO_LOGPROBS}", code="unsupported", param="include")
    check_fields(asked.model_extra or {}, RESPONSES, ResponsesRequest.model_fields)
    earlier = _earlier(asked, state.conversations, client)
    talk = conversation.read(_messages(asked), "input", begun=earlier is not None)
    kept = talk.system
    if earlier is not None:
        if talk.system is not None:
            raise ApiError(
                400,
                "input: a system message comes with the first response: use instructions for this one.",
                param="input",
            )
        kept = earlier.system
    system = "\n".join(text for text in (asked.instructions, kept) if text) or None
    turns = (*(() if earlier is None else earlier.turns), *talk.turns)
    return Question(
        conversation=Conversation(system, talk.media, talk.repeated, turns, talk.prompt),
        sampling=read_kwargs(asked.media_io_kwargs, asked.mm_processor_kwargs),
        options=asked.options(state.settings, asked.max_output_tokens),
        stops=asked.stops(),
        additions=asked.tieredkv or Additions(),
        client=client,
        earlier=() if earlier is None else earlier.media,
    ), kept


@router.post("/v1/responses")
async def respond(asked: ResponsesRequest, request: Request) -> Response:
    """Answer the last message of a conversation, and keep it unless `store` is false."""
    question, system = question_of(asked, request)
    reply = ResponseReply(request.app.state.engine.model_name, asked, question)

    def complete(answer: Answer) -> dict[str, Any]:
        body = reply.complete(answer)
        if asked.store is not False:
            turns = (*question.conversation.turns, (question.conversation.prompt, answer.generation.text))
            kept = Kept(question.client, body, question.media, turns, system)
            request.app.state.conversations.keep(kept)
        return body

    reading = Reading(events_of(request.app.state, question))
    if not asked.stream:
        return await whole(reading, request, complete)
    return await streamed(reading, request, lambda first: response_events(reading, first, reply, complete))


@router.get("/v1/responses/{name}")
async def get_response(name: str, request: Request) -> dict[str, Any]:
    """A response that was stored."""
    return request.app.state.conversations.find(name, client_of(request)).body


@router.delete("/v1/responses/{name}")
async def delete_response(name: str, request: Request) -> dict[str, Any]:
    """Forget a response. Those that continue it stay."""
    request.app.state.conversations.forget(name, client_of(request))
    return {"id": name, "object": "response", "deleted": True}
