"""A session on disk: what is written beside the cache, and what must agree before it is taken up again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.config import TierConfig, tiers_as_plain, tiers_from_file
from tieredkv.errors import SessionError
from tieredkv.models import adapters
from tieredkv.models.families.base import Positions, VideoGrid
from tieredkv.models.fingerprint import fingerprint_difference, model_fingerprint, model_state, state_difference
from tieredkv.models.settings import model_settings, processor_settings, settings_difference
from tieredkv.progress import Progress
from tieredkv.session.results import IngestStats
from tieredkv.storage import tensor_file
from tieredkv.video.frames import VideoSource


@dataclass(frozen=True, slots=True)
class SessionState:
    """All that a session is besides its model, processor, tiers and cache."""

    grid: VideoGrid
    positions: Positions
    head: str
    """The prompt before the video."""
    head_ids: list[int]
    video: dict[str, Any]
    """Name and SHA-256 of the video, and how it was sampled."""
    history: list[tuple[str, str]]
    ingest_s: float
    ingest_stats: IngestStats

    @staticmethod
    def of(plain: dict[str, Any]) -> SessionState:
        """From what `dataclasses.asdict` made, by way of JSON."""
        own = {
            "grid": VideoGrid(**{**_known(VideoGrid, plain["grid"]), "between": _tuples(plain["grid"])}),
            "history": [(str(question), str(answer)) for question, answer in plain["history"]],
            "ingest_stats": IngestStats(**_known(IngestStats, plain["ingest_stats"])),
        }
        return SessionState(**_known(SessionState, {**plain, **own}))

    @property
    def tokens(self) -> int:
        """Prompt tokens in the cache."""
        return len(self.head_ids) + self.grid.tokens


def _tuples(grid: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(ids) for ids in grid.get("between", ()))


def write(path: Path, model: Any, processor: Any, cache: TieredCache, state: SessionState, progress: Progress) -> int:
    """Write a session whose cache holds the video and no question; bytes written. Raises `SessionError`."""
    manifest = {
        "model": model_fingerprint(model),
        "model_settings": model_settings(model),
        "model_state": model_state(model),
        "processor": processor_settings(processor),
        "tiers": tiers_as_plain(cache.tiers),
        "session": asdict(state),
    }
    tensors = {
        f"layers.{layer.index:03}.{name}": tensor
        for layer in cache.tiered_layers
        for name, tensor in layer.state().items()
    }
    return tensor_file.write(path, manifest, tensors, progress)


def _known(kind: Any, plain: dict[str, Any]) -> dict[str, Any]:
    """Without what a later version has added to a dataclass."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in plain.items() if name in names}


def state_of(stored: tensor_file.Stored) -> SessionState:
    """Raises `SessionError` when the file holds something else than a session."""
    try:
        if absent := {"model", "model_settings", "processor", "tiers"} - stored.manifest.keys():
            raise KeyError(*absent)
        return SessionState.of(stored.manifest["session"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SessionError(f"{stored.path} holds no session ({error!r}).") from None


def tiers_of(stored: tensor_file.Stored, options: dict[str, Any]) -> TierConfig:
    """The settings a session was saved with, changed by `options`. Raises `SessionError` where that cannot be."""
    state_of(stored)  # or it is no session at all
    tiers = tiers_from_file(stored.manifest["tiers"], options.get("policy"))
    changed = replace(tiers, **options)
    if changed.chunk_tokens != tiers.chunk_tokens:
        raise SessionError(
            f"{stored.path} was saved in chunks of {tiers.chunk_tokens} tokens: chunk_tokens={changed.chunk_tokens} "
            "needs the video ingested again."
        )
    return changed


def check_origin(stored: tensor_file.Stored, model: Any, processor: Any) -> None:
    """Raise `SessionError` when the session was made with another model or processor, saying what differs."""
    manifest = stored.manifest
    state, now = manifest.get("model_state"), model_state(model)  # older files say nothing of this
    if difference := adapters.difference(state["adapters"] if state else {}, now["adapters"]):
        raise SessionError(f"{stored.path} was saved {difference}: load it with the adapters it was saved with.")
    difference = settings_difference(manifest["model_settings"], model_settings(model))
    if not difference:
        difference = fingerprint_difference(manifest["model"], model_fingerprint(model, not state))
    if not difference and state:
        difference = state_difference(state, now)
    if difference:
        raise SessionError(f"{stored.path} was saved with another model ({difference}): load it with that one.")
    settings = processor_settings(processor)
    if difference := settings_difference(manifest["processor"], settings):
        raise SessionError(f"{stored.path} was saved with another processor ({difference}): load it with that one.")


def check_video(stored: tensor_file.Stored, video: VideoSource) -> None:
    """Raise `SessionError` unless the session is of this video."""
    of = state_of(stored).video
    if of["sha256"] != video.sha256():
        raise SessionError(
            f"{stored.path} is a session of another video, {of['name']} as it was then, and {video.name} is not that: "
            "ingest it, or leave the video out to ask about the saved one."
        )


def map_cache(
    stored: tensor_file.Stored, config: Any, tiers: TierConfig, tokens: int, devices: list[torch.device]
) -> TieredCache:
    """A cache of `tokens` tokens that reads the file as it is used; each layer is checked before its first use.

    devices: of the model's layers.
    """
    cache = TieredCache(config, tiers, prompt_tokens=tokens)
    for layer, device in zip(cache.tiered_layers, devices, strict=True):
        prefix = f"layers.{layer.index:03}."
        names = [name for name in stored.names if name.startswith(prefix)]
        state = {name.removeprefix(prefix): stored.tensor(name) for name in names}
        try:
            layer.restore(state, tokens, device, partial(stored.verify, *names))
        except (KeyError, ValueError) as error:
            raise SessionError(f"{stored.path} does not hold layer {layer.index} of this session ({error}).") from None
    return cache
