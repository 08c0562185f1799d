"""Parts of messages: texts, and references to films and pictures, in the forms that clients send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tieredkv.serve.errors import ApiError
from tieredkv.serve.protocol.sampling import read_words

Kind = Literal["video", "image"]


@dataclass(frozen=True, slots=True)
class Reference:
    """A film or picture as a message names it."""

    kind: Kind
    url: str | None
    """A URL, or the id of an upload; None: the one that the client's `uuid` names."""
    uuid: str | None
    where: str = field(compare=False)
    """The part of the request, for errors."""
    sampling: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Fields of `Sampling` that the part itself sets."""


Item = str | Reference

_TEXTS = ("text", "input_text", "output_text")
_MEDIA: dict[str, Kind] = {
    "video_url": "video",
    "video": "video",
    "input_video": "video",
    "image_url": "image",
    "image": "image",
    "input_image": "image",
    "file": "video",
    "input_file": "video",
}
_NAMES = ("video_url", "video", "image_url", "image", "file", "file_url", "file_id", "file_data", "url", "data")
"""Where a part, or the object in it, names its film."""
_BESIDE = ("type", "uuid", "detail", "filename", "annotations", "logprobs", "cache_control")
"""What else may stand in a part. `detail` is for the scaling of OpenAI's own models; here `max_pixels` decides."""


def read_content(content: Any, where: str) -> list[Item]:
    """The items of a message, in their order; empty texts are left out. Raises `ApiError` for a part that is refused.

    content: a text, a list of parts, or None for no text. where: what the client calls the place.
    """
    if content is None:
        return []
    if isinstance(content, str):
        return [content] if content else []
    if not isinstance(content, list):
        raise ApiError(400, f"{where} is neither a text nor a list of parts: give one of these.", param=where)
    items = [_item(part, f"{where}[{i}]") for i, part in enumerate(content)]
    return [item for item in items if item != ""]


def _item(part: Any, where: str) -> Item:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ApiError(400, f"{where} is not a part: give an object with a type, or a text.", param=where)
    kind = part.get("type")
    if kind in _TEXTS:
        text = part.get("text")
        if not isinstance(text, str):
            raise ApiError(400, f"{where}.text is not a text: give one.", param=f"{where}.text")
        return text
    if isinstance(kind, str) and kind in _MEDIA:
        return _reference(part, _MEDIA[kind], where)
    if kind in ("input_audio", "audio_url", "audio"):
        raise ApiError(
            400,
            f"{where}: parts of type {kind} are not supported, because sound is not heard here: leave it out.",
            code="unsupported",
            param=where,
        )
    known = "text, video_url or image_url"
    raise ApiError(400, f"{where}.type={_short(kind)} is not supported: give {known}.", code="unsupported", param=where)


def _reference(part: Mapping[str, Any], kind: Kind, where: str) -> Reference:
    """A film's URL and uuid from the part, or from the object that stands in it under its type's name."""
    found: dict[str, str] = {}
    words: dict[str, Any] = {}
    for name, value in part.items():
        place = f"{where}.{name}"
        if isinstance(value, Mapping) and name in (*_NAMES, "input_video", "input_image", "input_file"):
            for inner, one in value.items():
                _take(inner, one, f"{place}.{inner}", found, words)
        else:
            _take("url" if name in ("input_video", "input_image", "input_file") else name, value, place, found, words)
    uuid = found.pop("uuid", None)
    urls = sorted(set(found.values()))
    if len(urls) > 1:
        raise ApiError(400, f"{where} names several films: give each a part of its own.", param=where)
    if not urls and uuid is None:
        raise ApiError(400, f"{where} names no film: give a url, the id of an upload, or a uuid.", param=where)
    return Reference(kind, urls[0] if urls else None, uuid, where, read_words(words, where))


def _take(name: str, value: Any, place: str, found: dict[str, str], words: dict[str, Any]) -> None:
    """Sort one field of a part: what names the film, what says how it is sampled, and what changes nothing."""
    if value is None:
        return
    if name == "uuid" or name in _NAMES:
        if not isinstance(value, str) or not value:
            raise ApiError(400, f"{place} is not valid: give a text.", param=place)
        if name == "uuid" and found.get("uuid", value) != value:
            raise ApiError(400, f"{place} differs from the other uuid of this part: give one.", param=place)
        found[place if name != "uuid" else "uuid"] = value
    elif name not in _BESIDE:
        words[name] = value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
