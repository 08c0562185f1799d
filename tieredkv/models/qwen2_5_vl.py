"""Qwen2.5-VL: multimodal rotary positions on three axes, absolute time, window attention in the vision tower."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from tieredkv.models.base import EncodedVideo, Positions


class Qwen25VL:
    """Adapter for `Qwen2_5_VLForConditionalGeneration`."""

    text_model_type = "qwen2_5_vl_text"

    def video_token(self, processor: Any) -> str:
        return processor.video_token

    def preprocess(self, processor: Any, frames: np.ndarray, fps: float) -> dict[str, torch.Tensor]:
        # uint8 all the way: resizing through float32 changes up to a quarter of the values.
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)
        return processor.video_processor(
            videos=[video],
            video_metadata=[{"fps": fps, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}],
            do_sample_frames=False,
            return_tensors="pt",
        )

    def grid(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[int, int, int]:
        merge = model.config.vision_config.spatial_merge_size
        t, h, w = inputs["video_grid_thw"][0].tolist()
        return t, h // merge, w // merge

    def encode_segments(
        self, model: Any, inputs: dict[str, torch.Tensor], segment_frames: int
    ) -> Iterator[torch.Tensor]:
        """Attention in the tower never crosses a temporal patch, so segments of whole patches are exact."""
        t, h, w = inputs["video_grid_thw"][0].tolist()
        steps = max(1, segment_frames // model.config.vision_config.temporal_patch_size)
        pixels = inputs["pixel_values_videos"]
        device = next(model.model.visual.parameters()).device
        for start in range(0, t, steps):
            stop = min(t, start + steps)
            part = pixels[start * h * w : stop * h * w].to(device)
            grid = torch.tensor([[stop - start, h, w]], device=device)
            outputs = model.model.get_video_features(part, grid, return_dict=True)
            yield torch.cat(tuple(outputs.pooler_output), dim=0)

    def seconds_per_step(self, model: Any, fps: float) -> float:
        return model.config.vision_config.temporal_patch_size / fps

    def positions(
        self, model: Any, head: int, video: EncodedVideo, tail: int, rule: Positions
    ) -> tuple[torch.Tensor, int]:
        """Three axes: time, row, column; text advances all three together.

        published: text after the video starts at max(previous) + 1, the model authors' rule. stock: whatever the
        installed transformers numbers a prompt (5.x starts the text max(rows, columns) after the video's start,
        whatever its duration; 5.17 also cuts the seconds per step to whole ones). Generated tokens continue after the
        last prompt token under both, as in `generate`.
        """
        positions = (
            self._stock(model, head, video, tail) if rule == "stock" else self._published(model, head, video, tail)
        )
        return positions, int(positions[0, -1]) + 1

    def _published(self, model: Any, head: int, video: EncodedVideo, tail: int) -> torch.Tensor:
        t, rows, columns = video.grid
        interval = model.config.vision_config.tokens_per_second * video.seconds_per_step
        times = (torch.arange(t) * interval).long()
        grid = torch.stack(torch.meshgrid(times, torch.arange(rows), torch.arange(columns), indexing="ij"))
        visual = grid.reshape(3, -1) + head
        text = torch.arange(head).expand(3, -1), (torch.arange(tail) + int(visual.max()) + 1).expand(3, -1)
        return torch.cat((text[0], visual, text[1]), dim=1)

    def _stock(self, model: Any, head: int, video: EncodedVideo, tail: int) -> torch.Tensor:
        merge = model.config.vision_config.spatial_merge_size
        t, rows, columns = video.grid
        visual = t * rows * columns
        kinds = torch.zeros((1, head + visual + tail), dtype=torch.long)
        kinds[:, head : head + visual] = 2
        positions, _ = model.model.get_rope_index(
            input_ids=torch.zeros_like(kinds),
            mm_token_type_ids=kinds,
            video_grid_thw=torch.tensor([[t, rows * merge, columns * merge]]),
            second_per_grid_ts=torch.tensor([video.seconds_per_step]),
        )
        return positions[:, 0]

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
