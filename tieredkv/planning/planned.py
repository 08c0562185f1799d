"""What a plan is about: a model whose weights are not needed, and videos that are opened and not decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tieredkv.config import TierConfig
from tieredkv.errors import OptionError, UnsupportedModelError
from tieredkv.models import families, loading
from tieredkv.models.chat_template import ChatTemplate
from tieredkv.models.encode import at_processor_rate, batch_tokens
from tieredkv.models.families.base import VideoGrid
from tieredkv.models.kv_shape import KVShape, model_shape
from tieredkv.models.quantised import scheme_of
from tieredkv.models.quantising import check_weights, quantised_config
from tieredkv.models.wrapped import unwrapped
from tieredkv.planning.fitting import ONE_VIDEO, Film
from tieredkv.planning.weight_bytes import weight_bytes
from tieredkv.video.frames import Sampled, open_video
from tieredkv.video.media import Medium
from tieredkv.video.sampling import Sampling


@dataclass(frozen=True)
class PlannedModel:
    """A model's config, and the model itself only if it was given."""

    config: Any
    dtype: torch.dtype
    path: str
    loaded: Any = None

    @staticmethod
    def of(model: Any, weights: str | None = None) -> PlannedModel:
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
        return PlannedModel(config, dtype, path, loaded)

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

    def head_tokens(self, processor: Any, video: PlannedVideo | None, system: str | None) -> int:
        """Prompt tokens before the first visual token."""
        template = ChatTemplate(families.video_family(self.config), processor, system=system)
        some = Sampled(1, 1, 1, 1.0, 0.0, 1.0) if video is None else video.sampled
        return _head_tokens(template, self.config, some)


def _head_tokens(template: ChatTemplate, config: Any, sampled: Sampled) -> int:
    return template.head_ids(config, template.around_video([("?", None)])[0], sampled).shape[1]


def _check_config(config: Any) -> None:
    """Raise `UnsupportedModelError` unless this is a valid config of a supported video model or text model."""
    if config.model_type not in families.VIDEO_FAMILIES:
        text = config.get_text_config(decoder=True)
        if text is not config or families.text_decoder(text).video_only:
            families.video_family(config)  # raises
    model_shape(config, torch.float32)


@dataclass(frozen=True)
class PlannedVideo:
    """An opened video, not decoded, and the processor that would turn it into visual tokens."""

    source: PlannedModel
    template: ChatTemplate
    sampling: Sampling
    name: str
    sampled: Sampled

    @staticmethod
    def open(source: PlannedModel, processor: Any, video: Any, sampling: Sampling, system: str | None) -> PlannedVideo:
        template = ChatTemplate(families.video_family(source.config), processor, system=system)
        sampling = at_processor_rate(sampling, processor)
        opened = open_video(video, sampling)
        return PlannedVideo(source, template, sampling, opened.name, Sampled.of(opened, sampling.max_pixels))

    @cached_property
    def grid(self) -> VideoGrid:
        return self.template.grid(self.source.config, self.sampled)

    @property
    def tower_size(self) -> tuple[int, int]:
        """Height and width of its frames as the vision tower sees them."""
        family, processor = self.template.family, self.template.processor
        return family.tower_size(self.source.config, processor, self.grid.rows, self.grid.columns)

    def encode_batch(self, tiers: TierConfig) -> int:
        return batch_tokens(self.template.family, self.source.config, self.sampled, self.grid, tiers)

    def encode_bytes(self, tiers: TierConfig) -> int:
        """Activations of a call of the vision tower."""
        config, grid = self.source.config, self.grid
        step = self.template.family.encode_bytes(config, (grid.steps, grid.step_tokens // grid.columns, grid.columns))
        return step * self.encode_batch(tiers) // grid.step_tokens

    def film(self, question_tokens: int) -> Film:
        """The tokens that it has at other rates and frame sizes."""
        template, config = self.template, self.source.config

        def around(sampled: Sampled, grid: VideoGrid) -> int:
            return _head_tokens(template, config, sampled) + question_tokens

        return Film(template, config, self.sampling, self.sampled, around)


@dataclass(frozen=True)
class PlannedMedia:
    """Opened videos and pictures of one prompt."""

    videos: tuple[PlannedVideo, ...]
    head: int
    """Tokens before the first."""
    tokens: int
    """Up to the end of the last."""

    @staticmethod
    def open(
        source: PlannedModel, processor: Any, media: Sequence[Medium], sampling: Sampling, system: str | None
    ) -> PlannedMedia:
        if sampling.fit:
            raise OptionError(ONE_VIDEO)
        family, config = families.video_family(source.config), source.config
        template = ChatTemplate(family, processor, system=system, media=[each.kind for each in media])
        videos = []
        for own, each in zip(template.of_each(), media, strict=True):
            rate = at_processor_rate(each.sampling(sampling), processor)
            opened = each.open(rate)
            videos.append(PlannedVideo(source, own, rate, opened.name, Sampled.of(opened, rate.max_pixels)))
        *texts, _ = template.texts([("?", None)])
        head = template.text_ids(config, 0, texts[0], videos[0].sampled).shape[1]
        tokens = template.context_tokens(config, texts, [(each.sampled, each.grid) for each in videos])
        return PlannedMedia(tuple(videos), head, tokens)

    @property
    def names(self) -> list[str]:
        return [each.name for each in self.videos]

    @property
    def visual_tokens(self) -> int:
        return sum(each.grid.visual_tokens for each in self.videos)

    def encode_bytes(self, tiers: TierConfig) -> int:
        """Activations of the largest call of the vision tower."""
        return max(each.encode_bytes(tiers) for each in self.videos)
