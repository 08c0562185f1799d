"""How long a context a cache can hold, where a model's config changes how tokens are seen as there are more of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tieredkv.errors import UnsupportedModelError
from tieredkv.models.families import text_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class LongContext:
    """Checks the length of the context before each call of the model.

    Cached keys are rotated once. `dynamic` rotary embeddings rotate all of them differently for each length above the
    model's, `longrope` for all above one length.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        """config: the model's, or its text's."""
        text = config.get_text_config(decoder=True)
        self._kind, self._window = text.model_type, text_decoder(text).window(text)
        self._most = self._switch = None
        for rope in _rotations(text):
            if rope.get("rope_type") == "dynamic":
                self._most = text.max_position_embeddings
            if rope.get("rope_type") == "longrope":
                own = getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings
                self._switch = rope.get("original_max_position_embeddings") or own

    def check(self, past: int, new: int) -> None:
        """Raise `UnsupportedModelError` if `past` cached tokens cannot be continued by `new` ones."""
        tokens = past + new
        if self._window is not None and tokens > self._window:
            raise UnsupportedModelError(
                f"this {self._kind} sees the last {self._window:,} tokens, and a context of {tokens:,} was given: "
                "TieredCache supports it up to the window's length."
            )
        if self._most is not None and tokens > self._most:
            raise UnsupportedModelError(
                f"this {self._kind} rotates all keys differently for each length above {self._most:,} tokens "
                f"(rope_type 'dynamic'), and a context of {tokens:,} was given: give a shorter one (a lower fps)."
            )
        if self._switch is not None and 0 < past <= self._switch < tokens:
            raise UnsupportedModelError(
                f"this {self._kind} rotates all keys differently in contexts of more than {self._switch:,} tokens "
                f"(rope_type 'longrope'), so {past:,} cached tokens cannot become {tokens:,}: give the first "
                f"{self._switch + 1:,} or more in one call."
            )

    def check_truncate(self, past: int, tokens: int) -> None:
        """Raise `UnsupportedModelError` if the first `tokens` of `past` cached tokens cannot be continued by others."""
        if self._switch is not None and 0 < tokens <= self._switch < past:
            raise UnsupportedModelError(
                f"this {self._kind} rotates all keys differently in contexts of more than {self._switch:,} tokens "
                f"(rope_type 'longrope'), so {past:,} cached tokens cannot be truncated to {tokens:,}: only to 0, or "
                f"to {self._switch + 1:,} or more."
            )


def trained_tokens(config: PreTrainedConfig) -> int | None:
    """The longest context that a model is made for, by its config; None if that does not say.

    Scaled rotary embeddings (linear, yarn) stretch the length that they were scaled from; some configs state only that.
    """
    text = config.get_text_config(decoder=True)
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    for rope in _rotations(text):
        factor = rope.get("factor")
        if rope.get("rope_type") in ("linear", "yarn") and isinstance(factor, int | float):
            longest = max(longest, int(factor * (rope.get("original_max_position_embeddings") or longest)))
    return longest


def beyond_training(trained: int | None, tokens: int) -> str | None:
    """What to say of a prompt longer than the model's longest context; None if it is not."""
    if trained is None or tokens <= trained:
        return None
    return f"more than the {trained:,} that the model is made for: answers may be poor"


def _rotations(text: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """Settings of rotary embeddings: one set, or one for each type of layer."""
    settings = getattr(text, "rope_parameters", None) or {}
    yield from [settings] if "rope_type" in settings else (each for each in settings.values() if isinstance(each, dict))
