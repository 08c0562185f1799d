"""How requests say which frames of a film to take: vLLM's words, and those of other servers, as ours."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tieredkv.errors import VideoError
from tieredkv.serve.errors import ApiError
from tieredkv.serve.settings import Settings
from tieredkv.video.sampling import Sampling

WORDS = {
    "fps": "fps",
    "num_frames": "max_frames",
    "nframes": "max_frames",
    "max_frames": "max_frames",
    "start": "start",
    "video_start": "start",
    "end": "end",
    "video_end": "end",
    "max_pixels": "max_pixels",
    "frame_recovery": "skip_damaged",
    "skip_damaged": "skip_damaged",
}
"""Words of requests, and the fields of `Sampling` that they set. `num_frames` is the most frames that are taken, spread
evenly over the film; a film for which the rate gives fewer has fewer."""
_UNLIMITED = ("fps", "num_frames")
"""Words of which -1 means, as for vLLM, that they are not given."""
_HARMLESS: dict[str, tuple[Any, ...]] = {"do_sample_frames": (True,)}
_REFUSED = {
    "do_sample_frames": "frames are always sampled here: leave it out",
    "max_duration": "films are not cut by a length: give end, in seconds of the film",
    "video_backend": "films are decoded by one decoder here: leave it out",
    "backend": "films are decoded by one decoder here: leave it out",
    "min_pixels": "frames are never enlarged by request: leave it out",
    "min_frames": "the rate is never raised by request: give fps",
    "total_pixels": "there is no limit on a whole film's pixels: give max_frames and max_pixels",
    "size": "its sizes mean different things to different models: give max_pixels",
    "resized_height": "frames keep their shape: give max_pixels",
    "resized_width": "frames keep their shape: give max_pixels",
}


def read_words(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of `Sampling` that these words set. Raises `ApiError` for a word that does not work, by its name.

    where: what the client calls the place that they are in.
    """
    fields: dict[str, Any] = {}
    for word, value in given.items():
        param = f"{where}.{word}"
        if value is None or value in _HARMLESS.get(word, ()) or (word in _UNLIMITED and value == -1):
            continue
        if word in _REFUSED:
            raise ApiError(400, f"{param} is not supported: {_REFUSED[word]}.", code="unsupported", param=param)
        if word not in WORDS:
            close = difflib.get_close_matches(word, WORDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"give one of {', '.join(WORDS)}."
            raise ApiError(400, f"{param[:120]} is not a word for sampling: {hint}", code="unknown_field", param=param)
        field = WORDS[word]
        if field in fields and fields[field] != value:
            raise ApiError(400, f"{param}={value!r} says otherwise than another word for it: give one.", param=param)
        try:
            Sampling(**{field: value})
        except VideoError as error:
            raise ApiError(400, f"{where}: {error}", code="bad_value", param=param) from None
        fields[field] = value
    return fields


def read_kwargs(media_io: Any, processor: Any) -> dict[str, Any]:
    """The same, of a request's `media_io_kwargs` and `mm_processor_kwargs`; the first takes precedence."""
    fields = read_words(_object(processor, "mm_processor_kwargs"), "mm_processor_kwargs")
    for kind, words in _object(media_io, "media_io_kwargs").items():
        where = f"media_io_kwargs.{kind}"
        if kind == "video":
            fields |= read_words(_object(words, where), where)
        elif words:
            raise ApiError(
                400, f"{where[:120]} is not supported: give words for video.", code="unsupported", param=where
            )
    return fields


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ApiError(400, f"{where[:120]} is not an object: give one, such as {{'fps': 1}}.", param=where)
    return value


def sampling_of(kind: str, fields: Mapping[str, Any], settings: Settings) -> Sampling:
    """How a film or picture is sampled: as the request says, otherwise by the server's defaults. Of a picture, only the
    pixels count. Raises `ApiError` for values that contradict each other."""
    sampling = Sampling(max_pixels=settings.max_pixels)
    if kind == "video":
        sampling = replace(sampling, fps=settings.fps, max_frames=settings.max_frames)
    else:
        fields = {name: value for name, value in fields.items() if name == "max_pixels"}
    try:
        return replace(sampling, **fields)
    except VideoError as error:
        raise ApiError(400, str(error), code="bad_value") from None
