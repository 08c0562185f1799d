"""Scenes as video files: H.264 in mp4, four times the size the model sees so that a person can watch them."""

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from tieredkv.tiny.draw import SIZE
from tieredkv.tiny.scene import Scene

SCALE = 4


def write_video(
    scene: Scene,
    path: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    crf: int = 18,
) -> Path:
    """Writes a scene as 224 x 224 H.264 at its constant frame rate; returns the path.

    `progress` is called with (frames written, frames in all). The file has its name only once it is complete.
    """
    import av

    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    rate = Fraction(scene.fps).limit_denominator(1001)
    done = 0
    try:
        with av.open(str(unfinished), "w", format="mp4") as container:
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
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
