"""Ask about a video through tiered memory: python examples/quickstart.py [VIDEO QUESTION]

Without arguments, a short video is generated and the bundled tiny model asked about it. To use a real model, replace
`tiny.PATH` by a path or hub id such as "Qwen/Qwen2.5-VL-3B-Instruct".
"""

import sys
import tempfile
from pathlib import Path

import tieredkv
from tieredkv.tiny import model as tiny
from tieredkv.tiny.scene import make_scene
from tieredkv.tiny.video import write_video


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) == 3:
            video, questions = sys.argv[1], [sys.argv[2]]
        else:
            scene = make_scene(seed=7, seconds=256, cards=8)
            video = str(write_video(scene, Path(folder) / "scene.mp4"))
            shape = scene.cards[0].shape
            questions = [f"what colour was the {shape} ?", f"follow the {shape} for 3 ?"]
        with tieredkv.open_session(tiny.PATH, video, gpu_kv_gb=0.001, fps=4, progress=True) as session:
            for question in questions:
                answer = session.ask(question, max_new_tokens=16)
                print(f"{question}  ->  {answer.text}")
                stats = answer.stats
                print(f"  {stats.kv_device_peak_bytes:,} of {stats.kv_full_bytes:,} bytes on the device")


if __name__ == "__main__":
    main()
