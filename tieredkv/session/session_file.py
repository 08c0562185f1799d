"""A session on disk: what is written besides the cache, and what must match before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tieredkv.cache.question import CONTEXT
from tieredkv.cache.tiered_cache import TieredCache
from tieredkv.cache.untiered import Snapshot
from tieredkv.codecs import PLAIN, codec_for
from tieredkv.codecs.base import Codec
from tieredkv.config import TierConfig, tiers_as_plain, tiers_from_file
from tieredkv.errors import SessionError
from tieredkv.memory.disk_tier import DiskTier
from tieredkv.memory.limits import check_host
from tieredkv.models import adapters
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.families.base import Slices, VideoGrid
from tieredkv.models.fingerprint import fingerprint_difference, model_fingerprint, model_state, state_difference
from tieredkv.models.placement import layer_devices
from tieredkv.models.same_model import SameModel
from tieredkv.models.settings import model_settings, processor_settings, settings_difference
from tieredkv.progress import Progress
from tieredkv.session import on_disk
from tieredkv.session.cached_video import CachedVideo
from tieredkv.session.ingested_video import IngestedVideo, Medium, VideoFacts
from tieredkv.session.manifest import check_manifest
from tieredkv.session.origin import ModelSource, sampling_as_plain, sampling_of
from tieredkv.session.results import IngestStats
from tieredkv.storage import tensor_file
from tieredkv.video.frames import VideoSource
from tieredkv.video.sampling import Sampling

RECORDS = "kv"
"""Name of a layer's records in a file."""


@dataclass(frozen=True, slots=True)
class SessionState:
    """What a session is besides its model, processor, tiers and cache."""

    video: IngestedVideo
    history: list[tuple[str, str]]
    """Questions and answers of the conversation."""

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        video = self.video
        return {
            "grid": asdict(video.grid),
            "positions": video.positions,
            "head": video.head,
            "head_ids": list(video.head_ids),
            "system": video.system,
            "video": {**asdict(video.facts), "clock": "file"},
            "kind": video.kind,
            "more": [asdict(each) for each in video.more],
            "history": self.history,
            "ingest_s": video.ingest_s,
            "ingest_stats": asdict(video.stats),
        }

    @staticmethod
    def of(plain: dict[str, Any], first_picture: float, sampling: Sampling | None) -> SessionState:
        """From `as_plain` by way of JSON. first_picture: when the first picture of the video is shown. sampling: of it.

        In older files times without a "clock" count from the first picture, and a missing "start" is 0.
        """
        facts = VideoFacts(**{"start": 0.0, **_known(VideoFacts, plain["video"])})
        if "clock" not in plain["video"]:
            facts = replace(facts, start=facts.start + first_picture)
        video = IngestedVideo(
            grid=_grid(plain["grid"]),
            positions=plain["positions"],
            head=plain["head"],
            head_ids=tuple(plain["head_ids"]),
            system=plain.get("system"),
            facts=facts,
            ingest_s=plain["ingest_s"],
            stats=_ingest_stats(plain["ingest_stats"]),
            sampling=sampling,
            kind=plain.get("kind", "video"),
            more=tuple(_medium(each) for each in plain.get("more", ())),
        )
        return SessionState(video, [(str(question), str(answer)) for question, answer in plain["history"]])


def _medium(plain: dict[str, Any]) -> Medium:
    facts = VideoFacts(**_known(VideoFacts, plain["facts"]))
    known = {
        **_known(Medium, plain),
        "text_ids": tuple(plain["text_ids"]),
        "grid": _grid(plain["grid"]),
        "facts": facts,
        "damaged": tuple((begin, end) for begin, end in plain.get("damaged", ())),
    }
    return Medium(**known)


def _grid(plain: dict[str, Any]) -> VideoGrid:
    between = tuple(tuple(ids) for ids in plain.get("between", ()))
    lengths = tuple(plain.get("lengths", ()))
    slices = plain.get("slices")
    if slices is not None:
        slices = Slices(**{**_known(Slices, slices), "before": tuple(tuple(ids) for ids in slices["before"])})
    return VideoGrid(**{**_known(VideoGrid, plain), "between": between, "lengths": lengths, "slices": slices})


def write(
    path: Path,
    cached: CachedVideo,
    history: list[tuple[str, str]],
    source: ModelSource | None,
    cap_is_default: bool,
    progress: Progress,
) -> tuple[int, int]:
    """Write a session while no question is answered; returns the file's size and the checksum of its header. Raises
    `SessionError`.

    source: of the model; None: unknown, so that the session has to be loaded with it. cap_is_default: whether
    `gpu_kv_gb` was not given, so that it follows from the card that the session is loaded to.
    """
    tensors = cache_tensors(cached.cache)
    manifest = {
        **origin_of(cached.model, cached.template.processor, source),
        **content_of(cached.cache, SessionState(cached.video, history)),
        "cap_is_default": cap_is_default,
    }
    return tensor_file.write(path, manifest, tensors, progress)


def origin_of(model: Any, processor: Any, source: ModelSource | None) -> dict[str, Any]:
    """The entries of a manifest that `origin_difference` reads. Takes as long as summing the weights."""
    origin = {
        "model": model_fingerprint(model),
        "model_settings": model_settings(model),
        "model_state": model_state(model),
        "processor": processor_settings(processor),
    }
    return origin if source is None else {**origin, "source": source.as_plain()}


def content_of(cache: TieredCache, state: SessionState) -> dict[str, Any]:
    """The other entries of a manifest."""
    content = {"tiers": tiers_as_plain(cache.tiers), "host": host_of(cache), "session": state.as_plain()}
    sampling = state.video.sampling
    return content if sampling is None else {**content, "sampling": sampling_as_plain(sampling)}


def host_of(cache: TieredCache) -> dict[str, Any]:
    """The entry "host" of a manifest: what records are, for `codec_of`. Files of format 1 have none."""
    dtype = str(cache.tiered_layers[0].dtype).removeprefix("torch.")
    sizes = {"chunk_tokens": cache.tiers.chunk_tokens, "head_dim": cache.shape.head_dim}
    return {"bits": cache.device_tier.host_bits, **sizes, "dtype": dtype}


def codec_of(manifest: dict[str, Any]) -> Codec:
    """Of the records in a file or checkpoint with this manifest. Raises `KeyError` or `ValueError` without one."""
    host = manifest["host"]
    if not isinstance(host, dict):
        raise ValueError(f"its entry 'host' is a {type(host).__name__}")
    dtype = getattr(torch, str(host["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {host['dtype']!r}")
    for name in ("bits", "chunk_tokens", "head_dim"):
        if not isinstance(host[name], int):
            raise ValueError(f"{name} is {host[name]!r}")
    return codec_for(host["bits"], host["chunk_tokens"], host["head_dim"], dtype)


def cache_tensors(cache: TieredCache) -> dict[str, torch.Tensor]:
    """What `map_cache` needs of a cache that holds what it was settled with, and no more."""
    snapshot = cache.untiered.snapshot
    tiered = {_tiered(layer.index): layer.state() for layer in cache.tiered_layers}
    untiered = {_untiered(number): state for number, state in enumerate(snapshot.states if snapshot else ())}
    return {prefix + name: part for prefix, state in (tiered | untiered).items() for name, part in state.items()}


def _tiered(number: int) -> str:
    """How the names of a tiered layer's tensors begin; `number` is among the tiered layers."""
    return f"layers.{number:03}."


def _untiered(number: int) -> str:
    """The same of the layers that do not grow, numbered among themselves. Older files have none."""
    return f"untiered.{number:03}."


def _ingest_stats(plain: dict[str, Any]) -> IngestStats:
    stats = IngestStats(**_known(IngestStats, plain))
    return replace(stats, damaged=tuple((begin, end) for begin, end in stats.damaged))


def _known(kind: Any, plain: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass, without those that a later version has added."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in plain.items() if name in names}


def state_of(stored: tensor_file.Stored, first_picture: float = 0.0) -> SessionState:
    """Raises `SessionError` if the file does not hold a session. first_picture: as in `SessionState.of`."""
    check_manifest(stored.path, stored.manifest)
    try:
        return SessionState.of(stored.manifest["session"], first_picture, sampling_of(stored.path, stored.manifest))
    except SessionError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SessionError(f"{stored.path} holds no session ({error!r}).") from None


def tiers_of(stored: tensor_file.Stored, options: dict[str, Any]) -> TierConfig:
    """The settings a session was saved with, changed by `options`. Raises `SessionError` if they cannot be changed."""
    state_of(stored)  # raises if it is not a session
    tiers = tiers_from_file(stored.manifest["tiers"], options.get("policy"))
    changed, bits = replace(tiers, **options), bits_of(stored)
    if changed.chunk_tokens != tiers.chunk_tokens:
        raise SessionError(
            f"{stored.path} was saved in chunks of {tiers.chunk_tokens} tokens: chunk_tokens={changed.chunk_tokens} "
            "needs the video ingested again."
        )
    if changed.host_kv_bits not in (None, bits):
        raise SessionError(
            f"{stored.path} was saved in {bits} bits: host_kv_bits={changed.host_kv_bits} needs the video ingested "
            "again."
        )
    return changed


def bits_of(stored: tensor_file.Stored) -> int:
    """Bits of the host tier in a file. Raises `SessionError` if the file does not say what its records are."""
    if "host" not in stored.manifest:  # files of format 1
        return PLAIN
    try:
        return codec_of(stored.manifest).bits
    except (KeyError, ValueError) as error:
        raise SessionError(
            f"{stored.path} does not say what its records are ({error}): ingest the video again."
        ) from None


def cap_is_default(stored: tensor_file.Stored, options: dict[str, Any]) -> bool:
    """Whether the cap was given neither when the session was saved nor in `options`. Older files do not say: False."""
    return stored.manifest.get("cap_is_default") is True and "gpu_kv_gb" not in options


def check_origin(stored: tensor_file.Stored, model: Any, processor: Any) -> None:
    """Raise `SessionError`, naming the difference, if the session was saved with another model or processor."""
    if difference := origin_difference(stored.manifest, model, processor):
        remedy = "that one" if difference.startswith("with another") else "the adapters it was saved with"
        raise SessionError(f"{stored.path} was saved {difference}: load it with {remedy}.")


def origin_difference(manifest: dict[str, Any], model: Any, processor: Any) -> str | None:
    """How model and processor differ from those of a manifest, as "with another model (...)"; None: they do not."""
    state, now = manifest.get("model_state"), model_state(model)  # older files do not state it
    if difference := adapters.difference(state["adapters"] if state else {}, now["adapters"]):
        return difference
    difference = settings_difference(manifest["model_settings"], model_settings(model))
    if not difference:
        difference = fingerprint_difference(manifest["model"], model_fingerprint(model, not state))
    if not difference and state:
        difference = state_difference(state, now)
    if difference:
        return f"with another model ({difference})"
    difference = settings_difference(manifest["processor"], processor_settings(processor))
    return difference and f"with another processor ({difference})"


def check_same_media(stored: tensor_file.Stored, sources: Sequence[VideoSource]) -> None:
    """Raise `SessionError` unless the session is about these videos and pictures, in this order."""
    media = state_of(stored).video.media
    if len(media) != len(sources):
        raise SessionError(
            f"{stored.path} was saved for {len(media)} videos and pictures, not {len(sources)}: ingest these, or leave "
            "them out to ask about the saved ones."
        )
    for medium, source in zip(media, sources, strict=True):
        if medium.facts.sha256 != source.sha256():
            raise SessionError(
                f"{stored.path} was saved for another video ({medium.facts.name}, as it was then) than {source.name}: "
                "ingest this one, or leave it out to ask about the saved one."
            )


def check_same_system(stored: tensor_file.Stored, given: str) -> None:
    """Raise `SessionError`, naming both, unless the session was saved with this system prompt."""
    if given != (saved := state_of(stored).video.system):
        had = "without a system prompt" if saved is None else f"with the system prompt {_quoted(saved)}"
        raise SessionError(
            f"{stored.path} was saved {had}, and {_quoted(given)} was given: leave it out, or ingest the video again."
        )


def _quoted(text: str) -> str:
    """The beginning of a text, in quotes."""
    return repr(text if len(text) <= 80 else f"{text[:79]}\u2026")


def load(
    stored: tensor_file.Stored, state: SessionState, model: Any, template: ChatTemplate, tiers: TierConfig
) -> CachedVideo:
    """The video of a session file, in memory or, if `host_kv_gb` is smaller, on disk. Raises `SessionError`, and
    `BudgetError` if `host_kv_gb` is too small even so."""
    tokens, same_model = state.video.tokens, SameModel(model)
    check_origin(stored, model, template.processor)
    disk = on_disk.stored_tier(model, tiers, tokens, bits_of(stored), stored)
    devices = layer_devices(template.family.decoder(model).layers)
    cache = map_cache(stored, model.config, tiers, tokens, devices, disk)
    return CachedVideo(model, template, cache, state.video, same_model, stored)


def map_cache(
    stored: tensor_file.Stored,
    config: Any,
    tiers: TierConfig,
    tokens: int,
    devices: list[torch.device],
    disk: DiskTier | None = None,
) -> TieredCache:
    """A cache of `tokens` tokens. Each tiered layer is read from the file, and checked, at its first use.

    devices: of the model's layers, the last of which may be readers of others and have nothing cached. disk: reads the
    records from the file again and again; None: they are mapped or, for a card, copied to memory that can be
    page-locked. Raises `BudgetError` before anything is copied if there is no room for that.
    """
    copied = disk is None and any(device.type == "cuda" for device in devices)
    if copied:
        _check_room_for_copy(stored, tiers)
    cache = TieredCache(config, tiers, prompt_tokens=tokens, disk=disk)
    cache.expect(CONTEXT)
    cache.device_tier.settle_bits(bits_of(stored))
    places: dict[Any, torch.device] = dict(zip(cache.layers, devices, strict=False))
    for layer in cache.tiered_layers:
        names, state = _layer_state(stored, _tiered(layer.index))
        try:
            codec = _codec_of(stored, state[RECORDS])
            layer.restore(
                state, tokens, codec, places[layer], partial(stored.verify, *names, keep=disk is None and not copied)
            )
        except (KeyError, ValueError) as error:
            raise SessionError(f"{stored.path} does not hold layer {layer.index} of this session ({error}).") from None
    if layers := cache.untiered.layers:
        states = []
        for number in range(len(layers)):
            names, state = _layer_state(stored, _untiered(number))
            if not names:
                raise SessionError(f"{stored.path} holds no state of layers that do not grow: ingest the video again.")
            stored.verify(*names)
            states.append({name: part.clone() for name, part in state.items()})  # the file may be closed before
        cache.untiered.restore(Snapshot(tokens, tuple(states)), [places[layer] for layer in layers])
    return cache


def _check_room_for_copy(stored: tensor_file.Stored, tiers: TierConfig) -> None:
    nbytes = sum(stored.tensor(name).nbytes for name in stored.names if name.endswith(f".{RECORDS}"))
    remedy = "give a smaller host_kv_gb, with which its records are read from the file"
    check_host(nbytes, tiers.host_kv_gb, f"{stored.path} in memory that a card reads", remedy)


def _codec_of(stored: tensor_file.Stored, kv: torch.Tensor) -> Codec:
    """Of the records `kv` of a layer. In files of format 1 they are `(K, chunks, 2, C, D)`, as the model made them."""
    if "host" in stored.manifest:
        return codec_of(stored.manifest)
    _, _, _, chunk_tokens, head_dim = kv.shape
    return codec_for(PLAIN, chunk_tokens, head_dim, kv.dtype)


def _layer_state(stored: tensor_file.Stored, prefix: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The tensors whose names begin with `prefix`: their names in the file, and by the rest of their names."""
    names = [name for name in stored.names if name.startswith(prefix)]
    return names, {name.removeprefix(prefix): stored.tensor(name) for name in names}
