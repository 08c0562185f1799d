"""Qwen3-VL: a timestamp as text before each temporal step, and features for several decoder layers (DeepStack)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tieredkv.environment.versions import cache_argument
from tieredkv.models.families.base import Positions, VideoGrid
from tieredkv.models.families.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """Adapter for `Qwen3VLForConditionalGeneration`.

    Features hold one vector of the decoder's hidden size for each layer that receives one, side by side.
    """

    model_types: tuple[str, ...] = ("qwen3_vl",)
    vision_settings: tuple[str, ...] = ("deepstack_visual_indexes",)
    time_form = "<12.5 seconds>"

    def placeholder(self, processor: Any, rule: Positions) -> str:
        """published: with the template's tokens around it, as each step has its own. stock: without, as in 5.x."""
        if rule == "stock":
            return processor.video_token
        return f"{processor.vision_start_token}{processor.video_token}{processor.vision_end_token}"

    def opening(self, processor: Any, frames: int, seconds: float, times: Sequence[float]) -> str:
        return f"<{(times[0] + times[-1]) / 2:.1f} seconds>{processor.vision_start_token}"

    def between(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return processor.vision_end_token + self.opening(processor, 0, 0.0, times)

    def introduction(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return self.opening(processor, 0, 0.0, times)

    def ending(self, processor: Any) -> str:
        return processor.vision_end_token

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        features = self._features(model, inputs)
        parts = (features.pooler_output, *features.deepstack_features)
        # Lists with a tensor per video; features for deeper layers are tensors before transformers 5.18 or so.
        whole = [part if isinstance(part, torch.Tensor) else torch.cat(tuple(part), dim=0) for part in parts]
        return torch.cat(whole, dim=1)

    def positions(
        self, model: Any, head: int, video: VideoGrid, begin: int, stop: int, rule: Positions
    ) -> torch.Tensor:
        """Three axes. Each step is numbered as a picture: text continues max(rows, columns) after the step's start."""
        index = torch.arange(begin, stop, device="cpu")
        within_video = (index - head).clamp(0, max(0, video.tokens - 1))
        side, starts = max(video.rows, video.columns), video.starts()
        step = torch.bucketize(within_video, starts, right=True) - 1  # the step that began last; -1 before the first
        current = step.clamp(min=0)
        offset = within_video - starts[current]
        visual = (index >= head) & (index < head + video.tokens) & (step >= 0) & (offset < video.step_tokens)
        # A finished step takes `side` positions for its `step_tokens` tokens.
        finished = current + ((step >= 0) & (offset >= video.step_tokens)).long()
        finished = torch.where(index >= head + video.tokens, video.steps, finished)
        finished = torch.where(index < head, 0, finished)
        text = index - finished * (video.step_tokens - side)
        start = text - offset
        picture = torch.stack((start, start + offset // video.columns, start + offset % video.columns))
        return torch.where(visual, picture, text)

    def decode(self, model: Any, embeddings: torch.Tensor, position_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        width = model.get_input_embeddings().weight.shape[1]
        hidden, *deeper = embeddings.split(width, dim=-1)
        deepstack: dict[str, Any] = {}
        if deeper:  # text tokens add zeros
            everywhere = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            deepstack = {"visual_pos_masks": everywhere, "deepstack_visual_embeds": [each[0] for each in deeper]}
        return (
            self.decoder(model)(
                inputs_embeds=hidden,
                position_ids=position_ids.unsqueeze(1).to(hidden.device),
                **cache_argument(cache),
                use_cache=True,
                **deepstack,
            )
        ).last_hidden_state
