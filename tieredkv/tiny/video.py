"""Scenes as video files: H.264 in mp4, at four times the size that the model sees, so that a person can watch them."""

import os
from fractions import Fraction
from pathlib import Path

from tieredkv.progress import Progress
from tieredkv.storage.atomic import replace_file
from tieredkv.tiny.draw import SIZE
from tieredkv.tiny.scene import Scene

SCALE = 4


def write_video(
    scene: Scene,
    path: str | os.PathLike[str],
    progress: Progress | None = None,
    crf: int = 18,
) -> Path:
    """Write a scene as 224 x 224 H.264 at its constant frame rate; returns the path.

    `progress` is called with frames written and their total. Raises `OutputError` if `path` cannot be written; the file
    is written whole or not at all.
    """
    import av

    path = Path(path)
    rate = Fraction(scene.fps).limit_denominator(1001)
    done = 0
    with replace_file(path) as part, av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "g": "48"})
        stream.width = stream.height = SIZE * SCALE
        stream.pix_fmt = "yuv420p"
        for block in scene.render():
            large = block.repeat(SCALE, axis=1).repeat(SCALE, axis=2)
            for pixels in large:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            done += len(block)
            if progress is not None:
                progress(done, scene.frame_count)
        container.mux(stream.encode())
    return path
