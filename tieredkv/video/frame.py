"""Single frames as users give them: images, arrays, tensors, and what readers return."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from tieredkv.errors import VideoError

SIZES_DIFFER = "the frames have different sizes: resize them to one size."


def channels_first(shape: tuple[int, ...]) -> bool:
    """Whether frames of this shape, `(T, ...)`, have their colours first. Raises `VideoError` if they have none."""
    first = len(shape) == 4 and shape[-1] != 3 and shape[1] == 3
    if len(shape) != 4 or (shape[-1] != 3 and not first):
        raise VideoError(f"frames have shape {shape}: give (T, H, W, 3) or (T, 3, H, W).")
    return first


def to_picture(frame: Any, channels_first: bool) -> np.ndarray:
    """A frame as uint8 `(H, W, 3)`. Raises `VideoError` for another shape, and for values out of range."""
    picture = as_array(frame)
    if channels_first and picture.ndim == 3:
        picture = picture.transpose(1, 2, 0)
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise VideoError(SIZES_DIFFER)
    if np.issubdtype(picture.dtype, np.floating):
        if not (np.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1):
            raise VideoError("floating point frames must lie in [0, 1]: scale them, or give uint8.")
        picture = (picture * 255).round().astype(np.uint8)
    return np.ascontiguousarray(picture)


def dtype_name(array: torch.Tensor | np.ndarray) -> str:
    return str(array.dtype).removeprefix("torch.")


def check_dtype(dtype: str) -> None:
    if dtype != "uint8" and "float" not in dtype:
        raise VideoError(f"frames have dtype {dtype}: give uint8, or floats in [0, 1].")


def as_array(frame: Any) -> np.ndarray:
    """One frame as an array, its values unchanged."""
    if callable(getattr(frame, "asnumpy", None)):  # decord's
        frame = frame.asnumpy()
    if isinstance(frame, torch.Tensor):
        frame = frame.detach().cpu()
        return (frame.float() if frame.is_floating_point() else frame).numpy()
    try:
        return np.asarray(frame.convert("RGB") if isinstance(frame, Image.Image) else frame)
    except (TypeError, ValueError, OSError, SyntaxError) as error:  # PIL's for a broken PNG is a SyntaxError
        raise VideoError(f"a frame cannot be read as an image ({error}): give PIL images or uint8 arrays.") from None
