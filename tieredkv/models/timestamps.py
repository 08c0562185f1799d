"""Questions whose answers are to name times of the video."""

from __future__ import annotations

from typing import Any

from tieredkv.errors import OptionError, check_value
from tieredkv.models.chat_template import ChatTemplate

REQUEST = "Say when in the video it is to be seen, in the form {form}."


def check_timestamps(timestamps: Any) -> bool:
    """The value as given. Raises `OptionError` unless it is True or False."""
    check_value(isinstance(timestamps, bool), "timestamps", timestamps, "True or False")
    return bool(timestamps)


def times_request(template: ChatTemplate) -> str:
    """What is added to a question whose answer is to name times, in the form in which the prompt writes them.

    Raises `OptionError` for several videos, of which a time could be meant, and for a family whose prompts do not say
    when a frame is shown.
    """
    if len(template.media) > 1:
        raise OptionError("timestamps=True is for one video: of several, a time does not say which is meant.")
    if template.media != ("video",):
        raise OptionError("timestamps=True is for a video: a picture has no times.")
    family = template.family
    if family.time_form is None:
        raise OptionError(
            f"timestamps=True does not apply to models of type {family.model_types[0]!r}, whose prompts do not say "
            "when a frame is shown: leave it out, and see the evidence for the moments that were attended to."
        )
    return REQUEST.format(form=family.time_form)
