"""Ingest a video once, save the session, ask it again: python examples/sessions.py [VIDEO SESSION QUESTION...]

The first run ingests VIDEO and writes SESSION; later runs load SESSION and do not read VIDEO. The questions form one
conversation. Without arguments, a short video is generated and the bundled tiny model asked about it.
"""

import argparse
import tempfile
import time
from pathlib import Path

import tieredkv
from tieredkv.tiny import model as tiny
from tieredkv.tiny.scene import make_scene
from tieredkv.tiny.video import write_video

MODEL, GPU_KV_GB, FPS = tiny.PATH, 0.001, tiny.FPS

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("video", nargs="?")
parser.add_argument("session", nargs="?", type=Path, help="a file to write, or to load if it exists")
parser.add_argument("questions", nargs="*")


def converse(video: str, saved: Path, questions: list[str]) -> None:
    if not saved.exists():
        print(tieredkv.plan(MODEL, video, gpu_kv_gb=GPU_KV_GB, fps=FPS, max_new_tokens=16))
        with tieredkv.open_session(MODEL, video, gpu_kv_gb=GPU_KV_GB, fps=FPS, progress=True) as session:
            print(f"{session.save(saved):,} bytes saved after {session.ingest_s:.1f} s of ingest")
    started = time.perf_counter()
    with tieredkv.load_session(saved, MODEL) as session:
        print(f"session and model loaded in {time.perf_counter() - started:.2f} s")
        for question in questions:
            answer = session.chat(question, max_new_tokens=16)
            print(f"{question}  ->  {answer.text}")
        print(f"{answer.stats.kv_device_peak_bytes:,} of {answer.stats.kv_full_bytes:,} bytes on the device")


def main() -> None:
    arguments = parser.parse_args()
    if arguments.video is not None and not arguments.questions:
        parser.error("give a video, the file of its session and at least one question, or no arguments.")
    try:
        if arguments.questions:
            converse(arguments.video, arguments.session, arguments.questions)
            return
        with tempfile.TemporaryDirectory() as folder:
            scene = make_scene(seed=7, seconds=256, cards=8)
            video = write_video(scene, Path(folder) / "scene.mp4")
            questions = [f"what colour was the {card.shape} ?" for card in scene.cards[:2]]
            for _ in range(2):  # the second time, the session is loaded
                converse(str(video), Path(folder) / "scene.tkv", questions)
    except tieredkv.TieredKVError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
