"""SmolVLM: an introduction states the video's length, and each frame is preceded by its time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from tieredkv.models.families.per_frame import PerFrame, patches_per_side


class SmolVLM(PerFrame):
    """Adapter for `SmolVLMForConditionalGeneration`.

    The introduction states the number of frames before they are decoded, so it relies on the length the file states.
    """

    model_types = ("smolvlm",)
    vision_modules = frozenset({"vision_model", "connector"})
    settings = ("scale_factor",)
    time_form = "01:02"

    def text_types(self) -> tuple[str, ...]:
        return ("llama",)

    def side(self, config: Any) -> int:
        return patches_per_side(config.vision_config) // config.scale_factor

    def visual_token(self, processor: Any) -> str:
        return processor.image_token

    def opening(self, processor: Any, frames: int, seconds: float, times: Sequence[float]) -> str:
        from num2words import num2words  # the processor needs it too
        from transformers.models.smolvlm.video_processing_smolvlm import DEFAULT_VIDEO_INTRO

        duration = timedelta(seconds=int(seconds))
        intro = DEFAULT_VIDEO_INTRO.format(frame_count=num2words(frames), video_duration=str(duration))
        return intro + self.introduction(processor, 0, times)

    def between(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return processor.fake_image_token + self.introduction(processor, step, times)

    def introduction(self, processor: Any, step: int, times: Sequence[float]) -> str:
        from transformers.models.smolvlm.video_processing_smolvlm import FRAME_TIMESTAMP_MESSAGE

        minutes, seconds = divmod(int(times[0]), 60)
        message = FRAME_TIMESTAMP_MESSAGE.format(timestamp=f"{minutes:02d}:{seconds:02d}")
        return f"{message}{processor.fake_image_token}{processor.global_image_token}"

    def ending(self, processor: Any) -> str:
        from transformers.models.smolvlm.video_processing_smolvlm import DEFAULT_MEDIA_OUTTRO

        return processor.fake_image_token + DEFAULT_MEDIA_OUTTRO

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Avoids `get_image_features`, which takes frames of one shade of grey for padding and drops them."""
        tower = model.model.vision_model
        pixels = inputs["pixel_values"].flatten(0, 1).to(next(tower.parameters()).device, model.dtype)
        edge = model.config.vision_config.patch_size
        n, _, height, width = pixels.shape
        mask = torch.ones((n, height // edge, width // edge), dtype=torch.bool, device=pixels.device)
        hidden = tower(pixel_values=pixels, patch_attention_mask=mask, return_dict=True).last_hidden_state
        return model.model.connector(hidden).flatten(0, 1)

    def decoder(self, model: Any) -> Any:
        return model.model.text_model
