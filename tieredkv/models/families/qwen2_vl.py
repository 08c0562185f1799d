"""Qwen2-VL, and what its successors share: rotary positions on three axes, temporal steps of two frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from tieredkv.memory.units import largest
from tieredkv.models.families.base import Positions, TooFewPixels, VideoFamily, VideoGrid, activation_bytes
from tieredkv.video.frames import Sampled

UNLIMITED = 2**40
"""Pixels; more than any video has."""


class Qwen2VL(VideoFamily):
    """Adapter for `Qwen2VLForConditionalGeneration`."""

    model_types: tuple[str, ...] = ("qwen2_vl",)
    vision_modules = frozenset({"visual"})

    def introduction(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return "<|vision_start|>"  # processors of Qwen2-VL do not name it

    def frame_grid(self, config: Any, processor: Any, sampled: Sampled) -> tuple[int, int, int]:
        """Runs the processor on a video on torch's meta device, which stores no pixels."""
        step_frames, max_pixels = self.step_frames(config), sampled.max_pixels
        height, width, fps = sampled.height, sampled.width, sampled.fps
        if max_pixels is None:
            video = _empty(max(sampled.frames, step_frames), height, width)
            return self._grid(config, self._preprocess(processor, video, fps))

        options = self._limiting(config, processor)

        def grid(limit: int) -> tuple[int, int, int]:
            video = _empty(step_frames, height, width)
            return self._grid(config, self._preprocess(processor, video, fps, **options(step_frames, limit)))

        def pixels(found: tuple[int, int, int]) -> int:
            return math.prod(self.tower_size(config, processor, *found[1:]))

        found = grid(max_pixels)
        if pixels(found) > max_pixels:
            below = largest(lambda limit: pixels(grid(limit)) > limit, pixels(grid(UNLIMITED)))
            raise TooFewPixels(sampled, below + 1)
        return -(-sampled.frames // step_frames), *found[1:]

    def tower_size(self, config: Any, processor: Any, rows: int, columns: int) -> tuple[int, int]:
        edge = processor.video_processor.patch_size * processor.video_processor.merge_size
        return rows * edge, columns * edge

    def _limiting(self, config: Any, processor: Any) -> Callable[[int, int], dict[str, Any]]:
        """Returns the processor's options for a segment of some frames of at most so many pixels each."""
        edge = 8 * self.tower_size(config, processor, 1, 1)[0]
        # Without the further limit that some processors can set for the whole video.
        free = {"cap_pixels_per_frame": False} if hasattr(processor.video_processor, "cap_pixels_per_frame") else {}

        def options(most: int) -> dict[str, Any]:
            return {"size": {"shortest_edge": 1, "longest_edge": most}, **free}

        # Whether the limits are those of a frame or of the whole video shows in two videos of the largest frames.
        one, other = (
            self._grid(config, self._preprocess(processor, _empty(length, edge, edge), 1.0, **options(edge**2)))[1:]
            for length in (self.step_frames(config), 4 * self.step_frames(config))
        )
        return lambda frames, pixels: options(pixels if one == other else pixels * frames)

    def preprocessor(
        self, config: Any, processor: Any, sampled: Sampled
    ) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
        _, rows, columns = self.frame_grid(config, processor, sampled)
        height, width, fps, max_pixels = sampled.height, sampled.width, sampled.fps, sampled.max_pixels
        limiting = self._limiting(config, processor) if max_pixels is not None else None

        @cache
        def limits(n: int) -> dict[str, Any]:
            """Options that give frames in a segment of n frames the same size as in the whole video."""
            if limiting is not None and max_pixels is not None:
                return limiting(n, max_pixels)

            def tokens(least: int, most: int) -> int:
                size = {"shortest_edge": least, "longest_edge": most}
                inputs = self._preprocess(processor, _empty(n, height, width), fps, size=size)
                return math.prod(self._grid(config, inputs)[1:])

            # Rows and columns grow with either limit, so bisection finds the one that applies.
            target, unlimited = rows * columns, tokens(1, UNLIMITED)
            least, most = 1, UNLIMITED
            if unlimited > target:
                most = _first(lambda limit: tokens(1, limit) >= target)
            elif unlimited < target:
                least = _first(lambda limit: tokens(limit, UNLIMITED) >= target)
            if tokens(least, most) != target:
                raise ValueError(f"no size limit gives {rows}x{columns} tokens for frames of {width}x{height}")
            return {"size": {"shortest_edge": least, "longest_edge": most}}

        step_frames = self.step_frames(config)
        limits(step_frames)  # raises before anything is decoded

        def preprocess(pixels: np.ndarray) -> dict[str, torch.Tensor]:
            if short := -len(pixels) % step_frames:  # as processors do, except Qwen3-VL's for a single frame
                pixels = np.concatenate((pixels, pixels[-1:].repeat(short, axis=0)))
            # uint8 until the processor: resizing in float32 changes up to a quarter of the values.
            video = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            return self._preprocess(processor, video, fps, **limits(video.shape[0]))

        return preprocess

    def _preprocess(self, processor: Any, video: torch.Tensor, fps: float, **options: Any) -> dict[str, torch.Tensor]:
        with torch.device("cpu"):  # whatever the caller's default device
            return processor.video_processor(
                videos=[video],
                video_metadata=[{"fps": fps, "total_num_frames": video.shape[0]}],
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
        """Exact for segments of whole temporal patches, which attention in the tower never crosses."""
        return torch.cat(tuple(self._features(model, inputs).pooler_output), dim=0)

    def _features(self, model: Any, inputs: dict[str, torch.Tensor]) -> Any:
        device = next(model.model.visual.parameters()).device
        pixels, grid = inputs["pixel_values_videos"].to(device), inputs["video_grid_thw"].to(device)
        return model.model.get_video_features(pixels, grid, return_dict=True)

    def encode_bytes(self, config: Any, grid: tuple[int, int, int]) -> int:
        vision = config.vision_config
        hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
        intermediate = getattr(vision, "intermediate_size", None) or int(vision.embed_dim * vision.mlp_ratio)
        patches = grid[1] * grid[2] * vision.spatial_merge_size**2
        pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return activation_bytes(patches, pixels, hidden, intermediate, vision.dtype)

    def rate(self, model: Any, video: VideoGrid) -> float:
        """Temporal positions per step."""
        return 1.0

    def positions(
        self, model: Any, head: int, video: VideoGrid, begin: int, stop: int, rule: Positions
    ) -> torch.Tensor:
        """Three axes: time, row, column; text advances all three.

        published: text after the video starts at max(previous) + 1, the authors' rule. stock: positions of the
        installed transformers (5.x starts the text max(rows, columns) after the video's start, whatever its duration;
        5.17 also truncates the seconds per step to whole ones).
        """
        if rule == "stock":
            return self._stock(model, head, video, stop)[:, begin:]
        index = torch.arange(begin, stop, device="cpu")
        visual = (index - head).clamp(0, video.tokens - 1)
        within = visual % video.step_tokens
        step, rate = visual // video.step_tokens, self.rate(model, video)
        grid = torch.stack(((step.float() * rate).long(), within // video.columns, within % video.columns)) + head
        last = (
            max(
                int(torch.tensor(video.steps - 1, dtype=torch.float32, device="cpu") * rate),
                video.rows - 1,
                video.columns - 1,
            )
            + head
        )
        after = index - head - video.tokens + last + 1
        return torch.where(index < head, index, torch.where(index < head + video.tokens, grid, after))

    def _stock(self, model: Any, head: int, video: VideoGrid, stop: int) -> torch.Tensor:
        merge = model.config.vision_config.spatial_merge_size
        total = max(stop, head + video.tokens)
        kinds = torch.zeros((1, total), dtype=torch.long, device="cpu")
        kinds[:, head : head + video.tokens] = 2
        grid = video.steps, video.rows * merge, video.columns * merge
        positions, _ = model.model.get_rope_index(
            input_ids=torch.zeros_like(kinds),
            mm_token_type_ids=kinds,
            video_grid_thw=torch.tensor([grid], dtype=torch.long, device="cpu"),
            **self._stock_times(video),
        )
        return positions[:, 0, :stop]

    def _stock_times(self, video: VideoGrid) -> dict[str, Any]:
        """Further arguments of `get_rope_index`."""
        return {}


def _empty(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.empty((frames, 3, height, width), dtype=torch.uint8, device="meta")


def _first(reached: Callable[[int], bool]) -> int:
    """The smallest limit for which a monotonic condition holds."""
    return 1 + largest(lambda limit: not reached(limit), UNLIMITED - 1)
