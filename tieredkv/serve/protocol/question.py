"""A request as one course of events: its films are found, the engine is asked, the answer ends before a stop text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request

from tieredkv.serve.asked import Answer, Asked, Film, Piece, Progress, Shown, Token
from tieredkv.serve.errors import ApiError
from tieredkv.serve.protocol.conversation import Conversation
from tieredkv.serve.protocol.generation import Additions
from tieredkv.serve.protocol.parts import Reference
from tieredkv.serve.protocol.sampling import sampling_of
from tieredkv.serve.protocol.stops import Stops


@dataclass(slots=True)
class Question:
    """What a request asks, before its films are found."""

    conversation: Conversation
    sampling: Mapping[str, Any]
    """Fields of `Sampling` for all films of the request."""
    options: dict[str, Any]
    stops: tuple[str, ...]
    additions: Additions
    client: str
    earlier: tuple[Shown, ...] = ()
    """Films of the conversation that this one continues."""
    media: tuple[Shown, ...] = field(default=(), init=False)
    """The films, once they are found."""


def client_of(request: Request) -> str:
    """Who asks: what the gate before all routes says, or the address."""
    address = "" if request.client is None else request.client.host
    return getattr(request.state, "client", address)


async def events_of(state: Any, question: Question) -> AsyncGenerator[Progress | Piece | Answer, None]:
    """What happens while a question is answered. The last event is the `Answer`, cut before its first stop text.

    state: of the application. Raises `ApiError` or a `TieredKVError`, before the first event if the question is
    refused. Films are pinned meanwhile.
    """
    with ExitStack() as pins:
        question.media = await _find(state, question, pins)
        talk = question.conversation
        asked = Asked(
            media=question.media,
            prompt=talk.prompt,
            turns=talk.turns,
            system=talk.system,
            options=question.options,
            evidence=question.additions.evidence,
            timestamps=question.additions.timestamps,
            client=question.client,
        )
        stops = Stops(question.stops)
        async with closing(state.engine.ask(asked)) as events:
            async for event in events:
                if isinstance(event, Piece):
                    if text := stops.feed(event.text):
                        yield Piece(text)
                elif isinstance(event, Answer):
                    if not stops.found and (text := stops.end()):
                        yield Piece(text)
                    yield _cut(event, stops)
                else:
                    yield event


def closing(events: AsyncIterator[Any]) -> Any:
    """A context that closes an iterator of the engine at its end."""
    return aclosing(events)  # type: ignore[type-var]


async def find_film(state: Any, reference: Reference, client: str, pins: ExitStack) -> Film:
    """The film that a client's message names; it is not removed until `pins` is closed. Errors name the part of the
    request."""
    try:
        film = await state.library.film(url=reference.url, uuid=reference.uuid, kind=reference.kind, client=client)
    except ApiError as error:
        error.param = error.param or reference.where
        raise
    pins.enter_context(state.library.pin(film))
    return film


async def _find(state: Any, question: Question, pins: ExitStack) -> tuple[Shown, ...]:
    """The films of the prompt, in their order."""
    talk, settings = question.conversation, state.settings
    media = [_sampled(shown, question.sampling) for shown in question.earlier]
    for shown in media:
        pins.enter_context(state.library.pin(shown.film))
    for reference in talk.media:
        film = await find_film(state, reference, question.client, pins)
        fields = {**question.sampling, **reference.sampling}
        media.append(Shown(film, sampling_of(film.kind, fields, settings)))
    for reference in talk.repeated:
        if reference in talk.media:
            continue
        film = await find_film(state, reference, question.client, pins)
        if film.sha256 not in {shown.film.sha256 for shown in media}:
            raise ApiError(
                400,
                f"{reference.where} shows a film that the conversation did not begin with: begin a new one with it.",
                code="new_film",
                param=reference.where,
            )
        # Where it lies now: the one that the conversation began with may be removed.
        media = [replace(shown, film=film) if shown.film.sha256 == film.sha256 else shown for shown in media]
    return tuple(media)


def _sampled(shown: Shown, fields: Mapping[str, Any]) -> Shown:
    """A film of an earlier request, sampled as this one says; otherwise as it was."""
    if not fields or shown.film.kind != "video":
        return shown
    return replace(shown, sampling=replace(shown.sampling, **fields))


def _cut(answer: Answer, stops: Stops) -> Answer:
    """An answer without its stop text and what follows."""
    text = stops.cut(answer.generation.text)
    if len(text) == len(answer.generation.text):
        return answer
    generation = replace(answer.generation, text=text)
    tokens = None if answer.tokens is None else _cut_tokens(answer.tokens, len(text))
    return replace(answer, generation=generation, finish_reason="stop", tokens=tokens)


def _cut_tokens(tokens: tuple[Token, ...], characters: int) -> tuple[Token, ...]:
    """The first tokens, with that many characters."""
    kept = []
    for token in tokens:
        if characters <= 0:
            break
        kept.append(replace(token, text=token.text[:characters]))
        characters -= len(token.text)
    return tuple(kept)
