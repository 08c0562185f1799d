"""Ask about a video through tiered memory: python examples/quickstart.py [VIDEO QUESTION...]

Without arguments, a short video is generated and the bundled tiny model asked about it. To use a real model, replace
`tiny.PATH` by a path or hub id such as "Qwen/Qwen2.5-VL-3B-Instruct".
"""

import argparse
import tempfile
from pathlib import Path

import tieredkv
from tieredkv.tiny import model as tiny
from tieredkv.tiny.scene import make_scene
from tieredkv.tiny.video import write_video

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("video", nargs="?")
parser.add_argument("questions", nargs="*")


def ask(video: str, questions: list[str]) -> None:
    with tieredkv.open_session(tiny.PATH, video, gpu_kv_gb=0.001, fps=4, progress=True) as session:
        for question in questions:
            answer = session.ask(question, max_new_tokens=16)
            print(f"{question}  ->  {answer.text}")
            stats = answer.stats
            print(f"  {stats.kv_device_peak_bytes:,} of {stats.kv_full_bytes:,} bytes on the device")


def main() -> None:
    arguments = parser.parse_args()
    if arguments.video is not None and not arguments.questions:
        parser.error("give a question about the video too, in quotes, or no arguments.")
    try:
        if arguments.questions:
            ask(arguments.video, arguments.questions)
            return
        with tempfile.TemporaryDirectory() as folder:
            scene = make_scene(seed=7, seconds=256, cards=8)
            video = write_video(scene, Path(folder) / "scene.mp4")
            shape = scene.cards[0].shape
            ask(str(video), [f"what colour was the {shape} ?", f"follow the {shape} for 3 ?"])
    except tieredkv.TieredKVError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
