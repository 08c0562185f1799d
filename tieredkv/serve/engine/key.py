"""Which questions can be answered from one session: those that show the same films to the same model in one way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tieredkv.config import TierConfig
from tieredkv.models.encode import at_processor_rate
from tieredkv.models.settings import value_hash
from tieredkv.serve.asked import Shown
from tieredkv.session.key import digest, sampling_key
from tieredkv.session.session_file import origin_of
from tieredkv.storage.header import FORMAT_VERSION

OF_PICTURES = ("max_pixels",)
"""What of a sampling applies to a picture."""
WITHOUT_EFFECT = ("source_fps",)
"""What of it does not apply to files."""


class Keys:
    """The keys of one model's sessions."""

    def __init__(self, model: Any, processor: Any, tiers: TierConfig) -> None:
        """Takes as long as summing the weights."""
        self._processor, self._tiers = processor, tiers
        origin = origin_of(model, processor, None)
        # Buffers are floats that are not the same to the last bit everywhere; a file's are compared when it is loaded.
        origin["model_state"] = {name: part for name, part in origin["model_state"].items() if name != "buffers"}
        pictures = getattr(processor, "image_processor", None)
        everything = {
            **origin,
            "format": FORMAT_VERSION,
            "pictures": None if pictures is None else value_hash(pictures.to_dict()),
            "chunk_tokens": tiers.chunk_tokens,
            "host_kv_bits": tiers.host_kv_bits,
        }
        self._origin = digest(everything)

    def of(self, media: Sequence[Shown], system: str | None) -> str:
        """64 hexadecimal digits."""
        identity: dict[str, Any] = {
            "origin": self._origin,
            "system": system,
            "media": [self._medium(shown) for shown in media],
        }
        if any(shown.sampling.fit for shown in media):  # which chooses by them
            identity["budgets"] = [self._tiers.gpu_kv_gb, self._tiers.host_kv_gb]
        return digest(identity)

    def _medium(self, shown: Shown) -> list[Any]:
        """What decides a film's tokens."""
        sampling, kind = shown.sampling, shown.film.kind
        if kind == "image":
            how = {name: value for name, value in sampling_key(sampling).items() if name in OF_PICTURES}
        else:
            known = sampling if sampling.fit else at_processor_rate(sampling, self._processor)
            how = {name: value for name, value in sampling_key(known).items() if name not in WITHOUT_EFFECT}
        return [kind, shown.film.sha256, how]
