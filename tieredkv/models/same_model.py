"""Whether a model is still the same as when a session was opened, checked before every question."""

from __future__ import annotations

from typing import Any

from tieredkv.errors import SessionError
from tieredkv.models import adapters
from tieredkv.models.fingerprint import adapter_weights, model_state, state_difference
from tieredkv.models.settings import model_settings, settings_difference
from tieredkv.models.wrapped import check_mode


class SameModel:
    """A model's settings, adapters, numbers and short buffers at one time; not its weights, which take long to hash."""

    def __init__(self, model: Any) -> None:
        """Raises `UnsupportedModelError` as `check_mode` does."""
        check_mode(model)
        self._model = model
        self._settings, self._state = model_settings(model), model_state(model, long=False)
        self._merged = adapters.merged(model)
        self._adapter_weights = adapter_weights(model)

    def check(self) -> None:
        """Raise `SessionError` if the model has changed, `UnsupportedModelError` as `check_mode` does."""
        check_mode(self._model)
        now = model_state(self._model, long=False)
        difference = adapters.difference(self._state["adapters"], now["adapters"])
        if not difference and adapters.merged(self._model) != self._merged:
            difference = "with other adapters merged into the weights than now"
        if not difference and adapter_weights(self._model) != self._adapter_weights:
            difference = f"with other weights in {adapters.in_words(adapters.names(now['adapters']))}"
        if not difference:
            named = settings_difference(self._settings, model_settings(self._model))
            if named := named or state_difference(self._state, now):
                difference = f"with another model ({named})"
        if difference:
            raise SessionError(f"this session was opened {difference}: go back to that, or open another session.")
