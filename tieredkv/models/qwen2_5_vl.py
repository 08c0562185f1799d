"""Qwen2.5-VL: multimodal rotary positions on three axes, absolute time, window attention in the vision tower."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tieredkv.models.base import Positions, VideoGrid


class Qwen25VL:
    """Adapter for `Qwen2_5_VLForConditionalGeneration`."""

    text_model_type = "qwen2_5_vl_text"

    def video_token(self, processor: Any) -> str:
        return processor.video_token

    def frame_grid(
        self, config: Any, processor: Any, frames: int, height: int, width: int, fps: float
    ) -> tuple[int, int, int]:
        """Asks the processor itself, with a video on torch's meta device, which has a shape and no pixels."""
        empty = torch.empty((frames, 3, height, width), dtype=torch.uint8, device="meta")
        return self._grid(config, self._preprocess(processor, empty, fps))

    def preprocessor(
        self, config: Any, processor: Any, frames: int, height: int, width: int, fps: float
    ) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
        _, rows, columns = self.frame_grid(config, processor, frames, height, width, fps)
        segment = torch.empty((self.step_frames(config), 3, height, width), dtype=torch.uint8, device="meta")
        size = dict(processor.video_processor.size)
        least, most = size["shortest_edge"], size["longest_edge"]

        def tokens(longest_edge: int) -> int:
            inputs = self._preprocess(processor, segment, fps, size={**size, "longest_edge": longest_edge})
            return math.prod(self._grid(config, inputs)[1:])

        # In a long video frames may get fewer pixels than `longest_edge` says. The `longest_edge` with which a short
        # one gets as few is found by bisection: rows and columns both fall with it.
        low, high = most if tokens(most) == rows * columns else min(least, most), most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if tokens(middle) <= rows * columns else (low, middle - 1)
        if tokens(low) != rows * columns:
            raise ValueError(f"no size limit makes {rows}x{columns} tokens of frames of {width}x{height}")

        def preprocess(pixels: np.ndarray) -> dict[str, torch.Tensor]:
            # uint8 all the way: resizing through float32 changes up to a quarter of the values.
            video = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            return self._preprocess(processor, video, fps, size={**size, "longest_edge": low})

        return preprocess

    def _preprocess(self, processor: Any, video: torch.Tensor, fps: float, **options: Any) -> dict[str, torch.Tensor]:
        n = video.shape[0]
        return processor.video_processor(
            videos=[video],
            video_metadata=[{"fps": fps, "total_num_frames": n}],
            do_sample_frames=False,
            return_tensors="pt",
            **options,
        )

    def _grid(self, config: Any, inputs: dict[str, torch.Tensor]) -> tuple[int, int, int]:
        merge = config.vision_config.spatial_merge_size
        t, h, w = inputs["video_grid_thw"][0].tolist()
        return t, h // merge, w // merge

    def step_frames(self, config: Any) -> int:
        return config.vision_config.temporal_patch_size

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Attention in the tower never crosses a temporal patch, so segments of whole patches are exact."""
        device = next(model.model.visual.parameters()).device
        pixels, grid = inputs["pixel_values_videos"].to(device), inputs["video_grid_thw"].to(device)
        outputs = model.model.get_video_features(pixels, grid, return_dict=True)
        return torch.cat(tuple(outputs.pooler_output), dim=0)

    def positions(
        self, model: Any, head: int, video: VideoGrid, begin: int, stop: int, rule: Positions
    ) -> torch.Tensor:
        """Three axes: time, row, column; text advances all three together.

        published: text after the video starts at max(previous) + 1, the model authors' rule. stock: whatever the
        installed transformers numbers a prompt (5.x starts the text max(rows, columns) after the video's start,
        whatever its duration; 5.17 also cuts the seconds per step to whole ones).
        """
        if rule == "stock":
            return self._stock(model, head, video, stop)[:, begin:]
        index = torch.arange(begin, stop)
        visual = (index - head).clamp(0, video.tokens - 1)
        within = visual % video.step_tokens
        step = visual // video.step_tokens
        rate = model.config.vision_config.tokens_per_second * video.seconds_per_step
        grid = torch.stack(((step * rate).long(), within // video.columns, within % video.columns)) + head
        last = max(int(torch.tensor(video.steps - 1) * rate), video.rows - 1, video.columns - 1) + head
        after = index - head - video.tokens + last + 1
        return torch.where(index < head, index, torch.where(index < head + video.tokens, grid, after))

    def _stock(self, model: Any, head: int, video: VideoGrid, stop: int) -> torch.Tensor:
        merge = model.config.vision_config.spatial_merge_size
        total = max(stop, head + video.tokens)
        kinds = torch.zeros((1, total), dtype=torch.long)
        kinds[:, head : head + video.tokens] = 2
        positions, _ = model.model.get_rope_index(
            input_ids=torch.zeros_like(kinds),
            mm_token_type_ids=kinds,
            video_grid_thw=torch.tensor([[video.steps, video.rows * merge, video.columns * merge]]),
            second_per_grid_ts=torch.tensor([video.seconds_per_step]),
        )
        return positions[:, 0, :stop]

    def embed(self, model: Any, input_ids: torch.Tensor) -> torch.Tensor:
        return model.get_input_embeddings()(input_ids)

    def decode(self, model: Any, embeddings: torch.Tensor, position_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        return model.model.language_model(
            inputs_embeds=embeddings,
            position_ids=position_ids.unsqueeze(1).to(embeddings.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def logits(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return model.lm_head(hidden).float()
