"""plan: the memory and copies that a prompt would need, before a weight is loaded or a frame decoded.

Bytes come from the functions that size the real cache, so a plan refuses what a session would refuse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tieredkv.config import TierConfig, tier_config
from tieredkv.errors import OptionError, UnsupportedModelError, VideoError, check_value, check_whole, is_number
from tieredkv.memory import limits
from tieredkv.memory.units import as_gib, largest
from tieredkv.models import families, loading
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.encode import at_processor_rate, batch_tokens
from tieredkv.models.families.base import VideoGrid
from tieredkv.models.kv_shape import KVShape, model_shape
from tieredkv.models.long_context import LongContext, trained_tokens
from tieredkv.models.quantised import scheme_of
from tieredkv.models.quantising import check_weights, quantised_config
from tieredkv.models.wrapped import unwrapped
from tieredkv.planning import decode_plan, forecast_bytes, sizes
from tieredkv.planning.admission import FEWER_TOKENS, Request, check_memory, smallest_cap_bytes
from tieredkv.planning.card_memory import CardMemory, working_bytes
from tieredkv.planning.cards import find_card
from tieredkv.planning.links import find_link
from tieredkv.planning.prefill_plan import question_rows, untiered_prefill_bytes
from tieredkv.planning.report import MemoryPlan
from tieredkv.planning.weight_bytes import weight_bytes
from tieredkv.video.download import download
from tieredkv.video.frames import Sampled, check_video, open_video
from tieredkv.video.sampling import Sampling
from tieredkv.video.urls import check_url, is_url

HEAD_TOKENS = 15
"""Tokens of text before the video without a processor: those of Qwen2.5-VL's chat template."""


def plan(
    model: Any,
    video_or_tokens: Any,
    *,
    gpu_kv_gb: float | None = None,
    host_kv_gb: float | None = None,
    tiers: TierConfig | None = None,
    processor: Any = None,
    weights: str | None = None,
    fps: float | None = None,
    source_fps: float | None = None,
    max_frames: int | None = None,
    start: float = 0.0,
    end: float | None = None,
    max_pixels: int | None = None,
    skip_damaged: bool = False,
    allow_url: bool = False,
    question_tokens: int = 64,
    max_new_tokens: int = 256,
    static_share: float = 0.0,
    system: str | None = None,
    link: str | float = "pcie4x16",
    card: str | float | None = None,
    **options: Any,
) -> MemoryPlan:
    """Forecast one video and one question: bytes by tier and purpose, and the time copies would take.

    model: a transformers config or model, a local path or a hub id; from the last two only the config is read. Video
    models, and text models under `TieredCache`. A config without a dtype counts as bfloat16; weights are counted as its
    `quantization_config` says. video_or_tokens: a number of visual tokens (for a text model, of tokens before the
    question), or a video as in `open_session`, which is opened but not decoded and needs the model's processor.
    question_tokens: text after the video, the chat template's end included. system: a system prompt, counted
    too. static_share: share of the heads assumed static, unless the policy fixes it. link: a name in `LINKS`, or GB/s;
    card: a name, or GB/s (`find_card`). weights: as in `open_session`. tiers, or its fields as further keywords. Of a
    card known by name the default of gpu_kv_gb is what is left of its memory.

    Raises `BudgetError` when a tier is too small, naming the smallest change that fits; `VideoError`,
    `UnsupportedModelError` or `OptionError` for bad input.
    """
    default_cap = tiers is None and gpu_kv_gb is None
    tiers = tier_config(tiers, {"gpu_kv_gb": gpu_kv_gb, "host_kv_gb": host_kv_gb, **options})
    link, link_speed = find_link(link)
    on = None if card is None else find_card(card)
    for name, value in (("question_tokens", question_tokens), ("max_new_tokens", max_new_tokens)):
        check_whole(name, value)
    share = is_number(static_share) and 0 <= static_share <= 1
    check_value(share, "static_share", static_share, "a share between 0 and 1")

    source = _Model.of(model, weights)
    shape = source.shape
    video: _Video | None = None
    if system is not None and source.is_text:
        raise OptionError("system= is for models that take video: count the system prompt as tokens.")
    sampling = Sampling(fps, source_fps, max_frames, start, end, max_pixels, skip_damaged)
    if isinstance(video_or_tokens, int):
        check_whole("visual tokens", video_or_tokens)
        if given := sampling.given():
            raise OptionError(f"{given[0]} does not apply to a number of tokens: give a video, or leave it out.")
        visual = video_or_tokens
        if processor is None and system is not None:
            processor = loading.load_processor(source.path)
    else:
        families.video_family(source.config)  # raises for a text model
        if is_url(video_or_tokens):
            check_url(video_or_tokens, allow_url)
            video_or_tokens = download(video_or_tokens)  # removed with the last reference to it
        check_video(video_or_tokens)
        if isinstance(video_or_tokens, Iterator):
            raise VideoError("a plan would use up the iterator: give its frames as a list, or a number of tokens.")
        if processor is None:
            processor = loading.load_processor(source.path)
        video = _Video.open(source, processor, video_or_tokens, sampling)
        visual = video.grid(video.sampled.frames).visual_tokens
    inside = visual if video is None else video.tokens(video.sampled.frames)
    if source.is_text:
        head = visual = 0
    else:
        head = HEAD_TOKENS if processor is None else source.head_tokens(processor, video, system)
    text = head + question_tokens
    prompt = text + inside
    LongContext(source.config).check(0, prompt + max_new_tokens)

    host, available = sizes.host_bytes(shape, tiers, prompt), limits.available_host_bytes()
    settings = tiers  # the cap may change below, on which the host tier does not depend
    fewer = FEWER_TOKENS if video is not None else "give fewer tokens or a smaller max_new_tokens"

    def smaller(allowed: int) -> str:
        kind = "tokens" if source.is_text else "visual tokens"
        return _smaller_host(shape, settings, host, available, text, video, allowed, kind)

    weighs = weight_bytes(source.config, source.dtype, source.loaded)
    needs = Request(prompt, question_tokens, max_new_tokens)
    vision = 0 if source.is_text else None if video is None else video.encode_bytes(tiers)
    working = working_bytes(source.config, shape, tiers, vision)
    memory = None
    if on is not None and on.memory_gib is not None:
        memory = CardMemory(on, weighs["decoder_bytes"] + weighs["vision_bytes"], working)
    if memory is not None:
        rows = question_rows(tiers, question_tokens)
        smallest = smallest_cap_bytes(shape, tiers, needs.layout(tiers), rows)
        if default_cap:
            memory.check(smallest, smallest, source.smaller_weights)
            tiers = replace(tiers, gpu_kv_gb=memory.default_cap)
    layout = check_memory(shape, tiers, needs, fewer, smaller, available=available)

    static = forecast_bytes.assumed_static(shape, tiers, static_share)
    decoding = decode_plan.plan_decode(shape, tiers, layout, tiers.cap_bytes, static.double(), static)
    n_static, n_dynamic = int(static.sum()), int((~static).sum())
    c = tiers.chunk_tokens
    recent = prompt - layout.recent_start + max_new_tokens
    static_pages, selected = int(decoding.pages[static].sum()), int(decoding.selected.sum())
    dynamic_pages = n_dynamic * layout.sink_chunks + selected
    decode = forecast_bytes.decode_bytes(shape, tiers, decoding, static)
    prefill = forecast_bytes.prefill_bytes(shape, tiers, prompt, question_tokens)
    read, copied = forecast_bytes.step_bytes(shape, tiers, decoding, static)
    memory_plan = MemoryPlan(
        model_type=source.config.model_type,
        dtype=str(source.dtype).removeprefix("torch."),
        shape=shape,
        **weighs,
        video=None if video is None else video.name,
        frames=None if video is None else video.sampled.frames,
        frame_size=None if video is None else (video.sampled.height, video.sampled.width),
        fps=None if video is None else video.sampled.fps,
        grid=None if video is None else video.steps_rows_columns,
        encode_batch=None if video is None else video.encode_batch(tiers),
        visual_tokens=visual,
        video_text_tokens=inside - visual,
        prompt_tokens=prompt,
        new_tokens=max_new_tokens,
        full_bytes=prompt * shape.token_bytes,
        host_bytes=host,
        snapshot_bytes=sizes.snapshot_bytes(shape, prompt),
        host_budget_bytes=limits.host_budget_bytes(tiers.host_kv_gb, available),
        cap_bytes=tiers.cap_bytes,
        prefill=prefill,
        decode=decode,
        untiered_prefill=untiered_prefill_bytes(shape, tiers, prompt, question_tokens),
        untiered_decode=sizes.untiered_bytes(shape, prompt + max_new_tokens - 1, 1),
        static_heads=n_static,
        dynamic_heads=n_dynamic,
        static_tokens=recent + c * static_pages // n_static if n_static else 0,
        dynamic_tokens=recent + c * dynamic_pages // n_dynamic if n_dynamic else 0,
        packed=decoding.packed,
        step_read_bytes=read,
        step_copy_bytes=copied,
        prefill_copy_bytes=forecast_bytes.prefill_copy_bytes(shape, tiers, prompt, question_tokens),
        link=link,
        link_gb_s=link_speed,
        card=None if on is None else on.name,
        card_gb_s=None if on is None else on.gb_s,
        card_bytes=None if memory is None else memory.nominal_bytes,
        working_bytes=working,
        reserve_bytes=None if memory is None else memory.reserve_bytes,
        trained_tokens=trained_tokens(source.config),
    )
    if memory is not None:
        memory.check(memory_plan.kv_bytes, smallest, source.smaller_weights)
    return memory_plan


# ---- the model and the video


@dataclass(frozen=True)
class _Model:
    """A model's config, and the model itself only if it was given."""

    config: Any
    dtype: torch.dtype
    path: str
    loaded: Any = None

    @staticmethod
    def of(model: Any, weights: str | None = None) -> _Model:
        from transformers import PreTrainedConfig

        model = unwrapped(model)
        check_weights(weights, loaded=hasattr(model, "generate"))
        if isinstance(model, str | Path):
            config, path, loaded = loading.load_config(model), str(model), None
        elif isinstance(model, PreTrainedConfig):
            config, path, loaded = model, getattr(model, "name_or_path", "") or "", None
        elif isinstance(getattr(model, "config", None), PreTrainedConfig) and hasattr(model, "generate"):
            config, path, loaded = model.config, getattr(model, "name_or_path", "") or "", model
        else:
            kind = type(model).__name__
            raise UnsupportedModelError(f"model is a {kind}: give a transformers config, {loading.WHAT_IS_A_MODEL}.")
        _check_config(config)
        if loaded is not None:
            dtype = loaded.get_input_embeddings().weight.dtype
        else:
            dtype = loading.stored_dtype(config)
            config = config if weights is None else quantised_config(config, weights, dtype)
        return _Model(config, dtype, path, loaded)

    def smaller_weights(self) -> dict[str, int]:
        """Bytes of all weights by the `weights=` that would quantise them; none if they are, or are loaded."""
        if self.loaded is not None or scheme_of(self.config) is not None:
            return {}
        smaller = {}
        for weights in ("8bit", "4bit"):
            parts = weight_bytes(quantised_config(self.config, weights, self.dtype), self.dtype)
            smaller[weights] = parts["decoder_bytes"] + parts["vision_bytes"]
        return smaller

    @property
    def shape(self) -> KVShape:
        return model_shape(self.config, self.dtype)

    @property
    def is_text(self) -> bool:
        """Whether it is a text model, which takes no video."""
        return self.config.model_type not in families.VIDEO_FAMILIES

    def head_tokens(self, processor: Any, video: _Video | None, system: str | None) -> int:
        """Prompt tokens before the first visual token."""
        template = ChatTemplate(families.video_family(self.config), processor, system=system)
        some = Sampled(1, 1, 1, 1.0, 0.0, 1.0) if video is None else video.sampled
        return template.head_ids(self.config, template.around_video([("?", None)])[0], some).shape[1]


def _check_config(config: Any) -> None:
    """Raise `UnsupportedModelError` unless this is a valid config of a supported video model or text model."""
    if config.model_type not in families.VIDEO_FAMILIES:
        text = config.get_text_config(decoder=True)
        if text is not config or families.text_decoder(text).video_only:
            families.video_family(config)  # raises
    model_shape(config, torch.float32)


@dataclass(frozen=True)
class _Video:
    """An opened video, not decoded, and the processor that would turn it into visual tokens."""

    source: _Model
    processor: Any
    video: Any
    sampling: Sampling
    name: str
    sampled: Sampled

    @staticmethod
    def open(source: _Model, processor: Any, video: Any, sampling: Sampling) -> _Video:
        opened = open_video(video, at_processor_rate(sampling, processor))
        return _Video(source, processor, video, sampling, opened.name, Sampled.of(opened, sampling.max_pixels))

    def grid(self, frames: int) -> VideoGrid:
        """The grid of the first `frames` frames."""
        family = families.video_family(self.source.config)
        return ChatTemplate(family, self.processor).grid(self.source.config, replace(self.sampled, frames=frames))

    @property
    def steps_rows_columns(self) -> tuple[int, int, int]:
        grid = self.grid(self.sampled.frames)
        return grid.steps, grid.rows, grid.columns

    def tokens(self, frames: int) -> int:
        """Tokens of the first `frames` frames and of the text between them."""
        return self.grid(frames).tokens

    def encode_batch(self, tiers: TierConfig) -> int:
        config, video = self.source.config, self.sampled
        return batch_tokens(
            families.video_family(config), config, video.height, video.width, self.grid(video.frames), tiers
        )

    def encode_bytes(self, tiers: TierConfig) -> int:
        """Activations of a call of the vision tower."""
        config, grid = self.source.config, self.grid(self.sampled.frames)
        family = families.video_family(config)
        step = family.encode_bytes(config, (grid.steps, grid.step_tokens // grid.columns, grid.columns))
        return step * self.encode_batch(tiers) // grid.step_tokens

    def most_frames(self, tokens: int) -> int:
        """The most frames from the start that have at most `tokens` tokens; 0 if one frame has more."""
        return largest(lambda frames: self.tokens(frames) <= tokens, self.sampled.frames)

    def most_fps(self, tokens: int, frames: int) -> float | None:
        """A rate in three digits, near that of `frames` frames, at which the whole video has at most `tokens`
        tokens."""
        value = self.sampled.fps * frames / self.sampled.frames
        unit = 10.0 ** (math.floor(math.log10(value)) - 2)
        for lower in range(3):
            fps = float(f"{(math.floor(value / unit + 1e-9) - lower) * unit:.6g}")
            slower = replace(self.sampling, fps=fps)
            expected = _Video.open(self.source, self.processor, self.video, slower).sampled.frames
            if expected < self.sampled.frames and self.tokens(expected) <= tokens:
                return fps
        return None


def _smaller_host(
    shape: KVShape,
    tiers: TierConfig,
    needed: int,
    available: int,
    text: int,
    video: _Video | None,
    allowed: int,
    kind: str,
) -> str:
    """The smallest changes with which the host tier holds the cache: fewer frames or tokens, or a larger cap."""
    most = needed // shape.token_bytes
    tokens = largest(lambda prompt: sizes.host_bytes(shape, tiers, prompt) <= allowed, most) - text
    changes = []
    if video is not None:
        if frames := video.most_frames(tokens):
            fps = video.most_fps(tokens, frames)
            changes += [f"fps={fps:g}"] if fps else []
            changes.append(f"max_frames={frames}")
    elif tokens > 0:
        changes.append(f"at most {tokens:,} {kind}")
    if needed <= available:
        changes.append(f"host_kv_gb={as_gib(needed)}")
    if not changes:
        return "that is too little for any video"
    return "give " + " or ".join([", ".join(changes[:-1]), changes[-1]] if len(changes) > 1 else changes)
