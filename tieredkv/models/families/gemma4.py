"""Gemma 4: each frame is preceded by its time; text tokens bring their ids along for the layers' own embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tieredkv.environment.versions import cache_argument
from tieredkv.models.families.base import TooFewPixels, activation_bytes
from tieredkv.models.families.decoder import TIERED, Decoder
from tieredkv.models.families.per_frame import EachFrame
from tieredkv.video.frames import Sampled

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BASE = 128
"""Of the digits in which ids are written beside embeddings: float16 and bfloat16 hold each exactly."""
DIGITS = 3


class Gemma4(EachFrame):
    """Adapter for `Gemma4ForConditionalGeneration`.

    Embeddings are those of the hidden size and `DIGITS` more numbers: a text token's id plus 1, in digits; a visual
    token's are 0. From them `decode` knows the embeddings that every layer adds (E2B, E4B), and which tokens are visual
    and see later ones of the same frame in layers with a sliding window (26B-A4B, 31B).
    """

    model_types: tuple[str, ...] = ("gemma4",)
    vision_modules: frozenset[str] = frozenset({"vision_tower", "embed_vision", "audio_tower", "embed_audio"})
    vision_settings: tuple[str, ...] = ("pooling_kernel_size", "position_embedding_size", "standardize")
    time_form = "01:02"
    seeing_ahead: tuple[str, ...] = ("sliding_attention",)
    """Types of layers in which the tokens of a frame see each other whole, if the config asks for it."""

    def opening(self, processor: Any, frames: int, seconds: float, times: Sequence[float]) -> str:
        minutes, seconds_left = divmod(int(times[0]), 60)
        return f"{minutes:02d}:{seconds_left:02d} {processor.boi_token}"

    def between(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return f"{processor.eoi_token} {self.opening(processor, 0, 0.0, times)}"

    def introduction(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return self.opening(processor, 0, 0.0, times)

    def ending(self, processor: Any) -> str:
        return processor.eoi_token

    def frame_grid(self, config: Any, processor: Any, sampled: Sampled) -> tuple[int, int, int]:
        from transformers.models.gemma4.video_processing_gemma4 import get_aspect_ratio_preserving_size

        video = processor.video_processor
        patch, pooled = video.patch_size, video.pooling_kernel_size
        most = self.limits(processor, sampled).get("max_soft_tokens", video.max_soft_tokens)
        size = get_aspect_ratio_preserving_size(sampled.height, sampled.width, patch, most * pooled**2, pooled)
        rows, columns = (edge // (patch * pooled) for edge in size)
        return sampled.frames, rows, columns

    def tower_size(self, config: Any, processor: Any, rows: int, columns: int) -> tuple[int, int]:
        edge = processor.video_processor.patch_size * processor.video_processor.pooling_kernel_size
        return rows * edge, columns * edge

    def limits(self, processor: Any, sampled: Sampled) -> dict[str, Any]:
        """The processor fits frames into one of a few numbers of tokens: the fewest that do not shrink a frame, at most
        those of `max_pixels`."""
        if sampled.max_pixels is None:
            return {}
        from transformers.models.gemma4.video_processing_gemma4 import _SUPPORTED_SOFT_TOKENS

        token = math.prod(self.tower_size(None, processor, 1, 1))
        allowed = [tokens for tokens in sorted(_SUPPORTED_SOFT_TOKENS) if tokens * token <= sampled.max_pixels]
        if not allowed:
            raise TooFewPixels(sampled, min(_SUPPORTED_SOFT_TOKENS) * token)
        whole = [tokens for tokens in allowed if tokens * token >= sampled.height * sampled.width]
        return {"max_soft_tokens": min(whole, default=max(allowed))}

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        tower, connector = model.model.vision_tower, model.model.embed_vision
        pixels, places = _patches(inputs, tower)
        hidden = tower(pixel_values=pixels, pixel_position_ids=places, return_dict=True).last_hidden_state
        return connector(inputs_embeds=hidden)

    def encode_bytes(self, config: Any, grid: tuple[int, int, int]) -> int:
        vision = config.vision_config
        patches = grid[1] * grid[2] * vision.pooling_kernel_size**2
        pixels = 3 * vision.patch_size**2
        return activation_bytes(patches, pixels, vision.hidden_size, vision.intermediate_size, vision.dtype)

    # ---- decoder

    def whole_steps(self, config: Any) -> bool:
        return _sees_ahead(config.get_text_config(decoder=True))

    def embed(self, model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = super().embed(model, input_ids)
        return torch.cat((hidden, _digits(input_ids + 1).to(hidden.device, hidden.dtype)), dim=-1)

    def decode(self, model: Any, embeddings: torch.Tensor, position_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        text, decoder = model.config.get_text_config(decoder=True), self.decoder(model)
        hidden, digits = embeddings.split((embeddings.shape[-1] - DIGITS, DIGITS), dim=-1)
        ids = _number(digits) - 1
        visual = ids < 0
        options: dict[str, Any] = {}
        if getattr(text, "hidden_size_per_layer_input", 0):
            of_text = torch.where(visual, text.pad_token_id, ids)
            options["per_layer_inputs"] = decoder.get_per_layer_inputs(of_text, None)
        if _sees_ahead(text) and visual.shape[1] > 1:
            masks: dict[str, torch.Tensor | None] = dict.fromkeys(text.layer_types)
            options["attention_mask"] = masks | dict.fromkeys(self.seeing_ahead, _ahead(visual))
        return decoder(
            inputs_embeds=hidden,
            position_ids=position_ids.to(hidden.device),
            use_cache=True,
            **options,
            **cache_argument(cache),
        ).last_hidden_state

    def logits(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        logits = model.get_output_embeddings()(hidden)
        cap = model.config.get_text_config(decoder=True).final_logit_softcapping
        return (logits if cap is None else (logits / cap).tanh() * cap).float()


class Gemma4Unified(Gemma4):
    """Adapter for `Gemma4UnifiedForConditionalGeneration` (12B), which has no vision tower: one layer embeds pixels.

    Frames see each other whole in full layers too, as in transformers' forward. (Its masks for static caches differ.)
    """

    model_types: tuple[str, ...] = ("gemma4_unified",)
    vision_modules: frozenset[str] = frozenset({"embed_vision", "embed_audio"})
    vision_settings: tuple[str, ...] = ("pooling_kernel_size", "mm_embed_dim", "mm_posemb_size")
    seeing_ahead: tuple[str, ...] = ("sliding_attention", TIERED)

    def frame_grid(self, config: Any, processor: Any, sampled: Sampled) -> tuple[int, int, int]:
        steps, rows, columns = super().frame_grid(config, processor, sampled)
        window = config.get_text_config(decoder=True).sliding_window
        if rows * columns > window:  # they see each other beyond the window too
            raise ValueError(f"{rows * columns} tokens of a frame are more than the model's window of {window}.")
        return steps, rows, columns

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        embedder = model.model.embed_vision
        pixels, places = _patches(inputs, embedder)
        return embedder(pixels, places, return_dict=True).pooler_output[(places != -1).all(-1)]

    def encode_bytes(self, config: Any, grid: tuple[int, int, int]) -> int:
        vision = config.vision_config
        pixels = 3 * (vision.patch_size * vision.pooling_kernel_size) ** 2
        return activation_bytes(grid[1] * grid[2], pixels, vision.mm_embed_dim, 0, vision.dtype)


@dataclass(frozen=True)
class Gemma4Decoder(Decoder):
    """Text models with sliding windows, whose full layers have sizes of their own, and whose last layers may have no
    keys and values: each attends to those of the last layer of its type that has some."""

    untiered: tuple[str, ...] = ("sliding_attention",)
    settings: tuple[str, ...] = (
        "attention_k_eq_v",
        "num_kv_shared_layers",
        "hidden_size_per_layer_input",
        "enable_moe_block",
        "per_layer_config",
    )
    mlp_norm: str | None = None

    def layer_types(self, text: PreTrainedConfig) -> list[str]:
        return self.checked(text, text.layer_types[: _own_layers(text)], text.use_bidirectional_attention != "all")

    def readers(self, text: PreTrainedConfig) -> int:
        return text.layer_types[_own_layers(text) :].count(TIERED)

    def read_from(self, text: PreTrainedConfig) -> int | None:
        own = _own_layers(text)
        kinds = text.layer_types[:own]
        read = [own - 1 - kinds[::-1].index(kind) for kind in set(text.layer_types[own:])]
        return min(read, default=None)


def _own_layers(text: PreTrainedConfig) -> int:
    """How many of its layers, the first ones, have keys and values of their own."""
    return text.num_hidden_layers - text.num_kv_shared_layers


def _sees_ahead(text: Any) -> bool:
    """Whether visual tokens see later ones of the same frame, in layers with a sliding window."""
    return text.use_bidirectional_attention == "vision"


def _patches(inputs: dict[str, torch.Tensor], tower: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches `(frames, n, values)` and their places `(frames, n, 2)`, -1 for none, where the tower is.

    Since transformers 5.18 or so processors return these; before, there was an axis of videos in front.
    """
    device = next(tower.parameters()).device
    pixels, places = inputs["pixel_values_videos"], inputs["video_position_ids"]
    return pixels.flatten(0, -3).to(device), places.flatten(0, -3).to(device)


def _ahead(visual: torch.Tensor) -> torch.Tensor:
    """How many tokens after it each token sees: a visual one the rest of its frame. `(1, n)` mask -> `(1, 1, n, 1)`."""
    from tieredkv.attention.interface import AHEAD  # imports transformers

    n = visual.shape[1]
    index = torch.arange(n, dtype=AHEAD, device=visual.device)
    text = torch.where(visual[0], n, index)
    next_text = text.flip(0).cummin(0).values.flip(0)
    return torch.where(visual[0], next_text - 1 - index, 0).view(1, 1, n, 1)


def _digits(numbers: torch.Tensor) -> torch.Tensor:
    """Digits to the base `BASE`, the lowest first, on a last axis of `DIGITS`."""
    return torch.stack([numbers // BASE**place % BASE for place in range(DIGITS)], dim=-1)


def _number(digits: torch.Tensor) -> torch.Tensor:
    """The inverse of `_digits`, int64."""
    return sum(
        (digits[..., place].long() * BASE**place for place in range(DIGITS)),
        torch.zeros_like(digits[..., 0], dtype=torch.int64),
    )
