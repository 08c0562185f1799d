"""MiniCPM-V 4.6 and 4.7: each frame is a picture between markers, and may be followed by tiles of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tieredkv.environment.versions import NEWEST, confuses_tiles
from tieredkv.errors import UnsupportedModelError
from tieredkv.memory.units import largest
from tieredkv.models.families.base import Positions, Slices, TooFewPixels, VideoFamily, VideoGrid, activation_bytes
from tieredkv.video.frames import Sampled

MARKERS = ("image_start", "image_end", "slice_start", "slice_end")
"""The processor has a token of each name, and the config of 4.7 its id."""


class MiniCPMV46(VideoFamily):
    """Adapter for `MiniCPMV4_6ForConditionalGeneration`.

    Attention in the tower never crosses pictures, so frames can be encoded in any groups. The processor cuts frames of
    more pixels than `scale_resolution` squared into tiles, unless its `slice_mode` is off or `max_slice_nums` is 1.
    """

    model_types: tuple[str, ...] = ("minicpmv4_6",)
    vision_modules = frozenset({"vision_tower", "merger"})
    settings: tuple[str, ...] = ("downsample_mode", "merge_kernel_size", "merger_times")
    vision_settings = ("insert_layer_id", "window_kernel_size")

    def text_types(self) -> tuple[str, ...]:
        return ("qwen3_5_text",)

    # ---- text

    def opening(self, processor: Any, frames: int, seconds: float, times: Sequence[float]) -> str:
        return self.numbered_opening(processor, 0, frames, seconds, times)

    def numbered_opening(self, processor: Any, number: int, frames: int, seconds: float, times: Sequence[float]) -> str:
        numbered = getattr(processor, "use_image_id", None)
        if numbered is None:
            numbered = processor.default_use_image_id
        written = f"{processor.image_id_start_token}{number}{processor.image_id_end_token}" if numbered else ""
        return written + processor.image_start_token

    def between(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return processor.image_start_token

    def introduction(self, processor: Any, step: int, times: Sequence[float]) -> str | None:
        return None  # positions of frames follow each other without a gap

    def after(self, processor: Any, times: Sequence[float], slices: Slices | None) -> str:
        return processor.image_end_token if slices is None else processor.slice_end_token

    # ---- pixels

    def frame_grid(self, config: Any, processor: Any, sampled: Sampled) -> tuple[int, int, int]:
        """Runs the processor on one frame on torch's meta device, which stores no pixels."""
        pictures, _ = self._pictures(config, processor, sampled)
        return sampled.frames, *pictures[0]

    def tower_size(self, config: Any, processor: Any, rows: int, columns: int) -> tuple[int, int]:
        edge = processor.video_processor.patch_size * _merged(config)
        return rows * edge, columns * edge

    def slices(self, config: Any, processor: Any, sampled: Sampled) -> Slices | None:
        pictures, (rows, columns) = self._pictures(config, processor, sampled)
        if len(pictures) == 1:
            return None
        if len(set(pictures)) > 1 and confuses_tiles(config.model_type):
            raise UnsupportedModelError(
                f"frames of {sampled.width}x{sampled.height} become tiles of another shape than the whole frame, which "
                "transformers before 5.19 encodes wrongly: install a newer one, or set the processor's "
                "video_processor.max_slice_nums to 1."
            )
        ended, begun = processor.slice_end_token, processor.slice_start_token
        first, row, other = processor.image_end_token + begun, f"{ended}\n{begun}", ended + begun
        texts = [first if tile == 0 else other if tile % columns else row for tile in range(rows * columns)]
        before = tuple(tuple(processor.tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
        return Slices(rows, columns, *pictures[1], before)

    def _pictures(self, config: Any, processor: Any, sampled: Sampled) -> tuple[list[tuple[int, int]], tuple[int, int]]:
        """Rows and columns of visual tokens of each picture that a frame becomes; rows and columns of the tiles."""
        self._check(config, processor)
        return self._cut(config, processor, sampled, **self._limits(config, processor, sampled))

    def _check(self, config: Any, processor: Any) -> None:
        """Raise `UnsupportedModelError` for settings of the processor that do not fit the model."""
        ours, theirs = processor.video_processor.downsample_mode, config.downsample_mode
        if ours != theirs:
            raise UnsupportedModelError(
                f"the processor's video_processor.downsample_mode is {ours!r} and the model config's is {theirs!r}: "
                "set both to the same."
            )
        if (stacked := getattr(processor.video_processor, "stack_frames", 1)) > 1:
            raise UnsupportedModelError(
                f"the processor's video_processor.stack_frames is {stacked}: pictures composed of several frames are "
                "not supported. Set it to 1."
            )

    def _limits(self, config: Any, processor: Any, sampled: Sampled) -> dict[str, int]:
        """Options with which all pictures of a frame have at most `sampled.max_pixels` pixels together: fewer tiles,
        then a smaller picture of the whole frame. Neither is ever more than the processor's, nor larger than the
        frame."""
        max_pixels, video = sampled.max_pixels, processor.video_processor
        if max_pixels is None:
            return {}

        def pixels(**options: int) -> int:
            pictures, _ = self._cut(config, processor, sampled, **options)
            return sum(math.prod(self.tower_size(config, processor, *picture)) for picture in pictures)

        side = min(video.scale_resolution, math.isqrt(sampled.height * sampled.width))
        if side == video.scale_resolution:  # smaller frames have no tiles
            for tiles in range(video.max_slice_nums, 1, -1):
                if pixels(max_slice_nums=tiles) <= max_pixels:
                    return {"max_slice_nums": tiles}
        most = largest(lambda side: pixels(max_slice_nums=1, scale_resolution=side) <= max_pixels, side)
        if not most:
            raise TooFewPixels(sampled, pixels(max_slice_nums=1, scale_resolution=1))
        return {"max_slice_nums": 1, "scale_resolution": most}

    def _cut(
        self, config: Any, processor: Any, sampled: Sampled, **options: int
    ) -> tuple[list[tuple[int, int]], tuple[int, int]]:
        """What `_pictures` returns, for options of the processor."""
        frame = torch.empty((1, 3, sampled.height, sampled.width), dtype=torch.uint8, device="meta")
        inputs, merged = self._preprocess(processor, frame, 1.0, **options), _merged(config)
        pictures = [(rows // merged, columns // merged) for rows, columns in inputs["target_sizes_videos"].tolist()]
        return pictures, tuple(inputs["grids_videos"][0].tolist())

    def preprocessor(
        self, config: Any, processor: Any, sampled: Sampled
    ) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
        options = self._limits(config, processor, sampled)

        def preprocess(pixels: np.ndarray) -> dict[str, torch.Tensor]:
            return self._preprocess(processor, torch.from_numpy(pixels).permute(0, 3, 1, 2), sampled.fps, **options)

        return preprocess

    def _preprocess(self, processor: Any, video: torch.Tensor, fps: float, **options: int) -> dict[str, torch.Tensor]:
        with torch.device("cpu"):  # whatever the caller's default device
            return processor.video_processor(
                videos=[video],
                video_metadata=[{"fps": fps, "total_num_frames": video.shape[0]}],
                do_sample_frames=False,
                return_tensors="pt",
                **options,
            )

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        tower, twice = model.model.vision_tower, model.config.downsample_mode != "4x"
        device = next(tower.parameters()).device
        pixels, sizes = inputs["pixel_values_videos"].to(device), inputs["target_sizes_videos"].to(device)
        given = {} if torch.get_default_dtype() == torch.float32 else {"position_ids": _places(tower, sizes)}
        hidden = tower(pixels.to(tower.dtype), target_sizes=sizes, use_vit_merger=twice, return_dict=True, **given)
        return torch.cat(tuple(model.model.merger(hidden.last_hidden_state, sizes // 2 if twice else sizes)), dim=0)

    def encode_bytes(self, config: Any, grid: tuple[int, int, int]) -> int:
        vision = config.vision_config
        patches, pixels = grid[1] * grid[2] * _merged(config) ** 2, vision.num_channels * vision.patch_size**2
        return activation_bytes(patches, pixels, vision.hidden_size, vision.intermediate_size, vision.dtype)


class MiniCPMV47(MiniCPMV46):
    """Adapter for `MiniCPMV4_7ForConditionalGeneration`: positions on three axes, on a canvas for each frame.

    The canvas is the frame's grid, or that of all its tiles, over which the picture of the whole frame is stretched.
    Markers are placed at its corners and newlines at its right edge.
    """

    model_types = ("minicpmv4_7",)
    settings = (*MiniCPMV46.settings, *(f"{name}_id" for name in MARKERS), "newline_id")
    tested = ("5.18", NEWEST)
    alone = "the markers between two of them would be numbered as parts of both"

    def numbered_opening(self, processor: Any, number: int, frames: int, seconds: float, times: Sequence[float]) -> str:
        return processor.image_start_token

    def _check(self, config: Any, processor: Any) -> None:
        super()._check(config, processor)
        for name in MARKERS:
            token = getattr(processor, f"{name}_token")
            expected, given = processor.tokenizer.convert_tokens_to_ids(token), getattr(config, f"{name}_id")
            if expected != given:
                raise UnsupportedModelError(
                    f"the model config's {name}_id is {given}, but {token!r} has the id {expected}: positions of "
                    "frames depend on it. Give the model's own processor, or correct the config."
                )

    def trailing(self, config: Any, tail: Sequence[int]) -> int:
        """Markers and newlines right after the one that ends the last picture."""
        markers = {config.newline_id, *(getattr(config, f"{name}_id") for name in MARKERS)}
        return next((count for count, token in enumerate(tail[1:]) if token not in markers), 0)

    def positions(
        self, model: Any, head: int, video: VideoGrid, begin: int, stop: int, rule: Positions
    ) -> torch.Tensor:
        """Three axes: time, row, column; text advances all three. A frame begins max(rows, columns) + 1 after the last.

        A frame's tokens are numbered from the marker before its picture, which is the last token of the text before it,
        to the one after its last picture, which is the first of the text after it.
        """
        index, first = torch.arange(begin, stop, device="cpu"), head - 1
        frame, rows, columns = _canvas(video)
        length, advance = frame.shape[1], max(rows, columns) + 1
        end = first + video.steps * length
        step = ((index - first) // length).clamp(0, max(0, video.steps - 1))
        origin = first + step * advance
        # The marker before a picture at the beginning of the prompt has no negative position.
        inside = (origin + frame[:, (index - first) % length]).clamp(min=0)
        after = index - end - video.trailing + first + video.steps * advance
        numbered = torch.where(index < end, inside, torch.where(index < end + video.trailing, origin, after))
        return torch.where(index < first, index, numbered)


def _merged(config: Any) -> int:
    """Patches of the vision tower along an edge of a visual token: merged two by two, twice unless in "4x" mode."""
    return 2 if config.downsample_mode == "4x" else 4


def _places(tower: Any, sizes: torch.Tensor) -> torch.Tensor:
    """Indices `(patches,)` into the tower's table of positions, of pictures of these rows and columns `(n, 2)`.

    As transformers computes them in float32; in another default dtype it finds other neighbours.
    """
    side = tower.embeddings.num_patches_per_side
    limits = torch.arange(1 / side, 1.0, 1 / side, dtype=torch.float32, device=sizes.device)

    def nearest(count: int) -> torch.Tensor:
        line = torch.arange(count, dtype=torch.float32, device=sizes.device)
        return torch.bucketize(line / count, limits, right=True)

    return torch.cat(
        [(nearest(rows).unsqueeze(1) * side + nearest(columns)).flatten() for rows, columns in sizes.tolist()]
    )


def _canvas(video: VideoGrid) -> tuple[torch.Tensor, int, int]:
    """Positions `(3, tokens)` of a frame's tokens, its markers included, from its canvas; the canvas' rows, columns."""

    def grid(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        down, across = torch.meshgrid(rows, columns, indexing="ij")
        return torch.stack((down, across)).flatten(1)

    def place(row: int, column: int) -> torch.Tensor:
        return torch.tensor([[row], [column]], dtype=torch.long, device="cpu")

    def spread(count: int, over: int) -> torch.Tensor:
        return torch.linspace(0, over - 1, count, dtype=torch.float32, device="cpu").round().long()

    tiles = video.slices
    rows, columns = (tiles.rows * tiles.height, tiles.columns * tiles.width) if tiles else (video.rows, video.columns)
    parts = [place(-1, -1), grid(spread(video.rows, rows), spread(video.columns, columns)), place(rows, columns)]
    for tile, text in enumerate(tiles.before if tiles else ()):
        assert tiles is not None
        top, left = tile // tiles.columns * tiles.height, tile % tiles.columns * tiles.width
        if tile and tile % tiles.columns == 0:  # newlines between the marker that ends a row and the next
            parts += [place(top - 1, columns)] * (len(text) - 2)
        down = torch.arange(top, top + tiles.height, device="cpu")
        across = torch.arange(left, left + tiles.width, device="cpu")
        parts += [place(top, left), grid(down, across), place(top + tiles.height - 1, left + tiles.width - 1)]
    return torch.nn.functional.pad(torch.cat(parts, dim=1), (0, 0, 1, 0)), rows, columns
