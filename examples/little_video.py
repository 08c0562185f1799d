"""What --tiny means in the examples: the bundled model, a short generated video, and questions it can answer."""

from pathlib import Path

from tieredkv.tiny import model as tiny
from tieredkv.tiny.scene import make_scene
from tieredkv.tiny.video import write_video

MODEL = str(tiny.PATH)
FPS = tiny.FPS
GPU_KV_GB = 0.002  # a full cache of the video would take 0.004


def make_video(folder: Path, seed: int = 7) -> tuple[str, list[str]]:
    """Generate four minutes of video in `folder`; returns its path and questions about the cards hidden in it."""
    scene = make_scene(seed=seed, seconds=256, cards=8)
    video = write_video(scene, folder / f"scene-{seed}.mp4")
    first, second = scene.cards[0].shape, scene.cards[1].shape
    return str(video), [f"what colour was the {first} ?", f"follow the {second} for 3 ?"]
