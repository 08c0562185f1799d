"""Questions about a long video on a 24 GB card, with Qwen2.5-VL-7B-Instruct in bfloat16.

    python examples/long_video_qa_24gb.py film.mp4 "What is on the table?" "Who comes in last?"
    python examples/long_video_qa_24gb.py --tiny    the bundled model and a video of its own, on any machine

The weights take 15.4 GiB. Keys and values take at most 4 GiB of the card, however long the film; the complete cache is
in host memory, in 8 bits, 4 GiB for 131,072 tokens. The plan reports all of this before any weights are loaded. If the
film does not fit, the plan names what would: fewer frames per second, or more memory.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tieredkv

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("video", nargs="?")
parser.add_argument("questions", nargs="*")
parser.add_argument("--fps", type=float, help="frames sampled per second [1; with --tiny 4]")
parser.add_argument("--gpu-kv-gb", type=float, help="GiB of the card for keys and values [4; with --tiny 0.002]")
parser.add_argument("--tiny", action="store_true", help="the bundled model, and a video of its own")


def run(name: str, video: str, questions: list[str], fps: float, gpu_kv_gb: float) -> None:
    print(tieredkv.plan(name, video, fps=fps, gpu_kv_gb=gpu_kv_gb, card="RTX 4090"))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.bfloat16, device_map=device).eval()
    processor = AutoProcessor.from_pretrained(name)
    with tieredkv.open_session(
        model, video, processor=processor, fps=fps, gpu_kv_gb=gpu_kv_gb, progress=True
    ) as session:
        for question in questions:
            answer = session.ask(question, max_new_tokens=256)
            print(f"{question}\n    {answer.text}")
        stats = answer.stats
        print(f"ingest {stats.ingest_s:.1f} s, then {stats.ttft_s:.2f} s to the first token of the last answer")
        print(
            f"at most {stats.kv_device_peak_bytes:,} of {stats.kv_full_bytes:,} bytes of keys and values on the device"
        )


def main() -> None:
    arguments = parser.parse_args()

    def given(fps: float, gpu_kv_gb: float) -> tuple[float, float]:
        """--fps and --gpu-kv-gb, or these."""
        return (
            fps if arguments.fps is None else arguments.fps,
            gpu_kv_gb if arguments.gpu_kv_gb is None else arguments.gpu_kv_gb,
        )

    try:
        if arguments.tiny:
            if arguments.video:
                parser.error("--tiny has its own video and questions: leave them out, or --tiny.")
            import little_video as little

            with tempfile.TemporaryDirectory() as folder:
                run(little.MODEL, *little.make_video(Path(folder)), *given(little.FPS, little.GPU_KV_GB))
        elif arguments.questions:
            name = "Qwen/Qwen2.5-VL-7B-Instruct"
            run(name, arguments.video, arguments.questions, *given(1.0, 4.0))
        else:
            parser.error("give a video and at least one question, or --tiny.")
    except tieredkv.TieredKVError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
