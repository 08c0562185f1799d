"""Video files for tests, and which pictures were read from them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tieredkv.video.frames import open_video
from tieredkv.video.sampling import Sampling


class Stream:
    """A file that can only be written from the beginning to the end, as a pipe."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def write(self, data: bytes) -> int:
        return self.file.write(data)


def write(
    path: Path,
    pictures,
    codec: str = "libx264",
    rate: int = 10,
    pixels: str = "yuv420p",
    format: str | None = None,
    pipe: bool = False,
    flags: dict[str, str] | None = None,
    keys: tuple[int, ...] = (),
    **options: str,
) -> Path:
    """A video of `pictures`, those in `keys` forced to be key frames; flags: the container's options."""
    output = Stream(path) if pipe else str(path)
    with av.open(output, "w", format=format, options=flags or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if i in keys:
                frame.pict_type = av.video.frame.PictureType.I
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if pipe:
        output.file.close()
    return path


def with_sound(path: Path, pictures, begin: float, rate: int = 4) -> Path:
    """A video whose pictures start `begin` seconds after its sound."""
    with av.open(str(path), "w") as output:
        video = output.add_stream("libx264", rate=rate, options={"bf": "0"})
        video.height, video.width = pictures[0].shape[:2]
        video.pix_fmt = "yuv420p"
        audio = output.add_stream("aac", rate=8000, layout="mono")
        for i in range(round(10 * (begin + len(pictures) / rate))):
            part = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.float32), format="fltp", layout="mono")
            part.rate, part.pts, part.time_base = 8000, 800 * i, Fraction(1, 8000)
            output.mux(audio.encode(part))
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(begin * rate) + i, Fraction(1, rate)
            output.mux(video.encode(frame))
        output.mux(video.encode())
        output.mux(audio.encode())
    return path


def retime(path: Path, source: Path, times: list[float]) -> Path:
    """The packets of `source` (no B-frames), packet i shown at times[i] seconds."""
    with av.open(str(source)) as original, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(original.streams.video[0])
        packets = [packet for packet in original.demux(original.streams.video[0]) if packet.size]
        for packet, time in zip(packets, times, strict=True):
            packet.pts = round(time / packet.time_base)
            # Decoding times must increase and precede presentation times; only the latter are irregular.
            packet.dts = min(packet.dts - round(2 / packet.time_base), packet.pts)
            packet.duration = round(0.1 / packet.time_base)
            packet.stream = stream
            output.mux(packet)
    return path


def set_length(path: Path, tag: bytes) -> None:
    """Overwrite the length that a Matroska file states for its video."""
    with av.open(str(path)) as container:
        stated = container.streams.video[0].metadata["DURATION"].encode()
    path.write_bytes(path.read_bytes().replace(stated, tag))


def noise(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Pictures that each differ from the others, and do not compress."""
    return list(np.random.default_rng(0).integers(0, 255, (count, height, width, 3), dtype=np.uint8))


def greys(count: int, height: int, width: int) -> list[np.ndarray]:
    """Uniform pictures: number i has brightness 10 + 20 * i."""
    return [np.full((height, width, 3), 10 + 20 * i, np.uint8) for i in range(count)]


def levels(pictures) -> list[int]:
    """Which of `greys` each picture is."""
    return [round((float(picture.mean()) - 10) / 20) for picture in pictures]


def numbered(count: int) -> list[np.ndarray]:
    """Pictures, 48 x 64, that encode their number in two uniform halves of twelve levels each."""
    halves = greys(12, 48, 32)
    return [np.concatenate([halves[i // 12], halves[i % 12]], axis=1) for i in range(count)]


def numbers(pictures) -> list[int]:
    """Which of `numbered` each picture is."""
    pictures = list(pictures)
    left, right = (levels(picture[:, part] for picture in pictures) for part in (slice(4, 28), slice(36, 60)))
    return [12 * tens + ones for tens, ones in zip(left, right, strict=True)]


def sample(path: Path, fps: float, **options) -> list[np.ndarray]:
    return list(open_video(path, Sampling(fps, **options)).frames())


def ticks(path: Path, seek: bool = True, **options) -> list[float]:
    seen: list[float] = []
    source = open_video(path, Sampling(**options))
    source._seek &= seek
    for _ in source.frames(seen.append):
        pass
    return seen


KINDS = {
    "faststart.mp4": {"flags": {"movflags": "faststart"}, "g": "10"},
    "plain.mp4": {"g": "10"},
    "cut.mkv": {"g": "10"},
    "cut.ts": {"g": "10"},
    "cut.avi": {"codec": "mpeg4"},
    "cut.webm": {"codec": "libvpx", "g": "10", "deadline": "realtime", "cpu-used": "8"},
}
