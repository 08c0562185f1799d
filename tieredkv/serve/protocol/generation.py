"""How an answer is generated: OpenAI's and vLLM's words as transformers' options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tieredkv.serve.errors import ApiError
from tieredkv.serve.settings import Settings

MOST_STOPS = 4
LONGEST_STOP = 1000
"""Characters of a stop text."""


class Additions(BaseModel):
    """`tieredkv` of a request: what no other server has."""

    model_config = ConfigDict(extra="forbid")

    evidence: bool | Literal["tokens"] = True
    """Report the moments that the answer looked at; "tokens": also those of each token."""
    timestamps: bool = False
    """Ask the model for times, and find those that the answer names."""
    progress: bool = False
    """Stream progress as chunks; otherwise it is in comments."""


class GenerationFields(BaseModel):
    """Fields that chat completions and responses share."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Beyond these, scores overflow, and no token can be drawn: on a card, that ends the whole process."""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    media_io_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    tieredkv: Additions | None = None

    def stops(self) -> tuple[str, ...]:
        """Stop texts. Raises `ApiError` for too many, or an empty one."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > MOST_STOPS:
            raise ApiError(400, f"stop has {len(given)} texts: give at most {MOST_STOPS}.", param="stop")
        if any(not 0 < len(text) <= LONGEST_STOP for text in given):
            raise ApiError(
                400, f"stop has an empty or very long text: give 1 to {LONGEST_STOP} characters.", param="stop"
            )
        return tuple(given)

    def options(self, settings: Settings, most: int | None) -> dict[str, Any]:
        """Options of `VideoSession.ask`. What the request does not say is the model's own choice.

        most: tokens of the answer, as the request says. A temperature of 0 is greedy, whatever else is given. Without a
        temperature, top_p, top_k or min_p ask for sampling at the model's own.
        """
        tokens = settings.max_new_tokens if most is None else most
        options: dict[str, Any] = {"max_new_tokens": tokens}
        if stops := self.stops():
            options["stop_strings"] = list(stops)
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        if self.ignore_eos:
            options["min_new_tokens"] = tokens
        elif self.min_tokens:
            options["min_new_tokens"] = min(self.min_tokens, tokens)
        if self.seed is not None:
            options["seed"] = self.seed
        return {**options, **self._choice()}

    def _choice(self) -> dict[str, Any]:
        """How the next token is chosen."""
        limits: dict[str, Any] = {}
        if self.top_p is not None:
            limits["top_p"] = self.top_p
        if self.top_k is not None:
            limits["top_k"] = max(0, self.top_k)
        if self.min_p is not None:
            limits["min_p"] = self.min_p
        if self.temperature is not None:
            # At a small temperature, scores divided by it overflow; greedy is what they mean.
            if self.temperature < 1e-3:
                return {"do_sample": False}
            return {"do_sample": True, "temperature": self.temperature, **limits}
        narrow = self.top_p not in (None, 1) or self.top_k not in (None, -1, 0) or self.min_p not in (None, 0)
        return {"do_sample": True, **limits} if narrow else {}
