"""Frames of a video, sampled by time: from a file through PyAV, or from arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from tieredkv.errors import VideoError
from tieredkv.memory.host import check_host_memory

Progress = Callable[[int, int | None], None]
"""Called with units done and the total, None while the total is unknown."""


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames at an even rate: frame i shows the video at `i / fps` seconds."""

    pixels: np.ndarray
    """uint8, `(T, H, W, 3)`, RGB."""
    fps: float


def load_frames(
    video: Any,
    fps: float,
    source_fps: float | None = None,
    max_frames: int | None = None,
    progress: Progress | None = None,
) -> Frames:
    """Frames of `video`, sampled `fps` times a second, at most `max_frames` from the start.

    video: a path, or frames: a list of PIL images, or an array or tensor `(T, H, W, 3)` or `(T, 3, H, W)`, uint8, or
    floats in [0, 1]. Frames given as arrays were taken at `source_fps` per second (None: at `fps`, none is dropped).
    Raises `VideoError`.
    """
    check_request(video, fps, source_fps, max_frames)
    _check_rate("fps", fps)
    if isinstance(video, str | Path):
        return _read_file(Path(video), fps, max_frames, progress)
    pixels = _as_pixels(video)
    if source_fps is not None:
        made = math.ceil(len(pixels) * fps / source_fps)
        check_host_memory(made * pixels[0].nbytes, f"{made:,} frames at fps={fps:g}", "lower fps, or check source_fps")
        wanted = np.arange(max(1, math.ceil(len(pixels) * fps / source_fps - 1e-9)))
        pixels = pixels[np.minimum((wanted * source_fps / fps + 1e-6).astype(int), len(pixels) - 1)]
    return Frames(np.ascontiguousarray(pixels[:max_frames]), fps)


def check_request(video: Any, fps: float | None, source_fps: float | None, max_frames: int | None) -> None:
    """Raise `VideoError` for rates and counts that cannot be, and for a path without a file: no frame is read.

    fps None: the model's own rate, known later.
    """
    if fps is not None:
        _check_rate("fps", fps)
    if source_fps is not None:
        _check_rate("source_fps", source_fps)
    if max_frames is not None and (not isinstance(max_frames, int) or isinstance(max_frames, bool) or max_frames < 1):
        raise VideoError(f"max_frames={max_frames!r} is not valid: give a whole number of at least 1.")
    if isinstance(video, str | Path):
        try:
            found, folder = Path(video).exists(), Path(video).is_dir()
        except (OSError, ValueError) as error:
            raise VideoError(f"{str(video)[:80]}: no such file ({error.__class__.__name__}).") from None
        if not found:
            raise VideoError(f"{video}: no such file.")
        if folder:
            raise VideoError(f"{video} is a folder, not a video file.")


def _check_rate(name: str, value: Any) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not good:
        raise VideoError(f"{name}={value!r} is not valid: give frames per second above 0.")


def _as_pixels(video: Any) -> np.ndarray:
    """uint8 `(T, H, W, 3)` of frames given as arrays or images."""
    if isinstance(video, torch.Tensor):
        tensor = video.detach().cpu()
        array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    elif isinstance(video, np.ndarray):
        array = video
    elif isinstance(video, Sequence) and not isinstance(video, bytes | bytearray):
        if len(video) == 0:
            raise VideoError("the video has no frames: give at least one.")
        try:
            images = [np.asarray(frame.convert("RGB") if hasattr(frame, "convert") else frame) for frame in video]
        except (TypeError, ValueError) as error:
            raise VideoError(
                f"a frame cannot be read as an image ({error}): give PIL images or uint8 arrays."
            ) from None
        if len({image.shape for image in images}) != 1:
            raise VideoError("the frames have different sizes: resize them to one size.")
        array = np.stack(images)
    else:
        raise VideoError(
            f"video is a {type(video).__name__}: give a path, a list of PIL images, or an array (T, H, W, 3)."
        )
    if array.ndim == 4 and array.shape[-1] != 3 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] != 3:
        raise VideoError(f"frames have shape {tuple(array.shape)}: give (T, H, W, 3) or (T, 3, H, W).")
    if 0 in array.shape:
        raise VideoError(f"the video has no frames or empty ones: its shape is {tuple(array.shape)}.")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise VideoError("floating point frames must lie in [0, 1]: scale them, or give uint8.")
        return (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise VideoError(f"frames have dtype {array.dtype}: give uint8, or floats in [0, 1].")
    return array


def _read_file(path: Path, fps: float, max_frames: int | None, progress: Progress | None) -> Frames:
    sampler = _Sampler(path, fps, max_frames)
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise VideoError(f"{path}: there is no video stream in this file.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            seconds, tolerance = _stated_seconds(container, stream)
            total = None if seconds is None else max(1, math.floor(seconds * fps))
            if total is not None:
                total = total if max_frames is None else min(total, max_frames)
                what = f"{path}: {total:,} frames of {stream.width}x{stream.height}"
                size = 2 * total * stream.width * stream.height * 3  # the frames, and the array they are stacked in
                check_host_memory(size, what, "lower fps or max_frames, or make the video smaller")
            for frame in container.decode(stream):
                if frame.time is not None:
                    sampler.show(frame, frame.time)
                if sampler.full:
                    break
                if progress is not None:
                    progress(len(sampler.pictures), total)
            sampler.finish()
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if sampler.last_time is None:
            raise VideoError(f"{path}: not a readable video file ({reason}).") from None
        raise VideoError(_cut_short(path, sampler.last_time, reason)) from None
    if not sampler.pictures:
        raise VideoError(f"{path}: there is a video stream but not one frame in it.")
    end = sampler.shown_until
    if not sampler.full and seconds is not None and end < seconds - tolerance:
        raise VideoError(_cut_short(path, end, f"the file says it lasts {seconds:.2f} s"))
    if progress is not None:
        progress(len(sampler.pictures), len(sampler.pictures))
    return Frames(np.stack(sampler.pictures), fps)


def _cut_short(path: Path, time: float, reason: str) -> str:
    return (
        f"{path}: decoding stopped at {time:.2f} s ({reason}): the file is damaged or cut short. "
        "Get it whole, or re-encode what there is."
    )


def _stated_seconds(container: Any, stream: Any) -> tuple[float | None, float]:
    """How long the file says its video is (None: it does not say), and by how much the last frame may fall short."""
    seconds = None
    if stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    elif tag := stream.metadata.get("DURATION"):  # matroska's, "00:01:02.500000000"
        seconds = _clock_seconds(tag)
    if seconds is not None:
        return seconds, 1.0
    if container.duration is None:
        return None, 0.0
    # The length of the longest stream, which may be the sound.
    seconds = container.duration / av.time_base
    return seconds, 1.0 if len(container.streams) == 1 else max(5.0, 0.1 * seconds)


def _clock_seconds(text: str) -> float | None:
    try:
        hours, minutes, seconds = text.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None


class _Sampler:
    """Keeps what is on screen at 0, 1/fps, 2/fps ... seconds after the first frame, whatever the file's own rate."""

    def __init__(self, path: Path, fps: float, max_frames: int | None) -> None:
        self.path, self.fps, self.max_frames = path, fps, max_frames
        self.pictures: list[np.ndarray] = []
        self.last_time: float | None = None
        self._origin = self._gap = 0.0
        self._frame: Any = None
        self._picture: np.ndarray | None = None

    @property
    def full(self) -> bool:
        return self.max_frames is not None and len(self.pictures) >= self.max_frames

    def show(self, frame: Any, time: float) -> None:
        """`frame` is on screen from `time` on. A frame whose time runs backwards is left out."""
        if self.last_time is None:
            self._origin = time
        elif time - self._origin < self.last_time:
            return
        self._keep_until(time - self._origin)
        self._gap = 0.0 if self.last_time is None else time - self._origin - self.last_time
        self.last_time = time - self._origin
        self._frame, self._picture = frame, None

    def finish(self) -> None:
        """The last frame shown stays for its own duration."""
        if self._frame is not None and self.last_time is not None:
            self._keep_until(self.last_time + max(self._last_duration, 2 * _SAME_TIME))

    @property
    def shown_until(self) -> float:
        """When the last frame leaves the screen: after its own duration, or as long as the one before it stayed."""
        return (self.last_time or 0.0) + max(self._last_duration, self._gap)

    @property
    def _last_duration(self) -> float:
        return 0.0 if self._frame is None else float((self._frame.duration or 0) * self._frame.time_base)

    def _keep_until(self, time: float) -> None:
        while self._frame is not None and not self.full and len(self.pictures) / self.fps < time - _SAME_TIME:
            if self._picture is None:
                # The display matrix turns counterclockwise, and so does rot90: a phone's portrait video stands upright.
                turns = round(self._frame.rotation / 90) % 4
                self._picture = np.rot90(self._frame.to_ndarray(format="rgb24"), turns)
                if self.pictures and self.pictures[0].shape != self._picture.shape:
                    (h, w, _), (first_h, first_w, _) = self._picture.shape, self.pictures[0].shape
                    raise VideoError(
                        f"{self.path}: the picture changes from {first_w}x{first_h} to {w}x{h} at {time:.2f} s: "
                        "re-encode the file at one size."
                    )
            self.pictures.append(self._picture)


_SAME_TIME = 1e-4
"""Seconds: a frame this little after a sampling time still counts as shown at it (container clocks round)."""
