"""A video in a cache, ready for questions: the result of an ingest, or of loading a session file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.same_model import SameModel
from tieredkv.session.ingested_video import IngestedVideo
from tieredkv.storage.tensor_file import Stored


@dataclass(frozen=True, slots=True)
class CachedVideo:
    """The cache holds the prompt up to the end of the video and, between questions, nothing more."""

    model: Any
    template: ChatTemplate
    cache: TieredCache
    video: IngestedVideo
    same_model: SameModel
    """The model as it was when the cache was created or loaded."""
    stored: Stored | None = None
    """The file that the cache reads, if it was loaded."""

    def check(self) -> None:
        """Raise `SessionError` if the model or the file has changed since."""
        if self.stored is not None:
            self.stored.check_unchanged()
        self.same_model.check()

    def close(self) -> None:
        """Free both tiers."""
        self.cache.close()
