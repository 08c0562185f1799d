"""What the parts of the server hand to each other: films, questions, and what happens while one is answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tieredkv.evidence.target import Wanted
from tieredkv.session.results import Generation
from tieredkv.video.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Film:
    """A video or picture that is a file of this machine, already examined."""

    path: Path
    sha256: str
    """Of its bytes, in hexadecimal."""
    name: str
    """What messages call it; without secrets."""
    kind: Literal["video", "image"] = "video"


@dataclass(frozen=True, slots=True)
class Shown:
    """A film of the prompt, and how it is sampled."""

    film: Film
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with all that decides its answer."""

    media: tuple[Shown, ...]
    """At least one; they stand before the text."""
    prompt: str
    turns: tuple[tuple[str, str], ...] = ()
    """Earlier questions and answers of the conversation."""
    system: str | None = None
    """None: the server's, if it has one."""
    options: dict[str, Any] = field(default_factory=dict)
    """Generation options of `VideoSession.ask`."""
    evidence: Wanted = True
    timestamps: bool = False
    client: str = ""
    """Who asks: the queue serves clients in turn."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What is being done before the first piece of text."""

    stage: Literal["queued", "ingest", "load", "question"]
    """Waiting; reading the film; loading its session from disk; reading the question."""
    done: int = 0
    """Tokens cached; while queued, requests that are served before this one."""
    total: int | None = None
    seconds: float = 0.0
    """Since the stage began."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The next characters of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer, as text, and what was attended to when it was chosen."""

    text: str
    moments: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The last event: the whole answer."""

    generation: Generation
    finish_reason: Literal["stop", "length"]
    reused: bool
    """Whether the film's session was there already."""
    tokens: tuple[Token, ...] | None = None
    """With `evidence="tokens"`; their texts joined are the answer's."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The last event of `prepare`: the film can be asked about."""

    reused: bool
    tokens: int
    """Of the prompt up to the end of the last film."""
    seconds: float
    """Length of the films."""


class Engine(Protocol):
    """Answers questions, one at a time. Its methods are called on the event loop."""

    model_name: str
    """Its id for clients."""
    created: int
    """Seconds since the epoch."""
    observers: list[Callable[[Generation], None]]
    """Called with each complete answer."""

    def snapshot(self) -> Any:
        """An `EngineState`: what it has done and holds now."""

    def ask(self, asked: Asked) -> AsyncIterator[Progress | Piece | Answer]:
        """Answer a question. `aclose` on the iterator, or cancelling the task that reads it, stops the work within one
        decoding step or one chunk of prefill. Raises `ApiError` (queue full, timeout, shutting down) or a
        `TieredKVError` for what is wrong with the question or the film."""

    def prepare(self, asked: Asked) -> AsyncIterator[Progress | Ready]:
        """Ingest the films of a question that is yet to come, unless they are there. Otherwise like `ask`."""
