"""The same questions about every clip in a folder, as JSON lines. May be stopped at any time and run again to continue.

    python examples/camera_archive.py clips/ answers.jsonl "Is somebody at the door?" "Which cars are there?"
    python examples/camera_archive.py --tiny    the bundled model and clips of its own, on any machine

Each clip gets one line: {"clip": ..., "answers": {question: answer}}, or {"clip": ..., "error": ...} if it cannot be
read or does not fit. Clips whose answers are in the file are skipped; those that failed are retried.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tieredkv
from tieredkv.video.sampling import Sampling

VIDEOS = {".mp4", ".mkv", ".mov", ".webm", ".avi", ".ts"}

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("clips", nargs="?", type=Path, help="a folder, searched with its subfolders")
parser.add_argument("answers", nargs="?", type=Path, help="a .jsonl file, new or to be continued")
parser.add_argument("questions", nargs="*")
parser.add_argument("--model", "-m", help=f"a path or hub id [{MODEL}]")
parser.add_argument("--fps", type=float, help="frames sampled per second [1; with --tiny 4]")
parser.add_argument("--gpu-kv-gb", type=float, help="GiB of the device for keys and values [2; with --tiny 0.002]")
parser.add_argument("--tiny", action="store_true", help="the bundled model, and a video of its own")


def answered(file: Path, questions: list[str]) -> set[str]:
    """Clips for which the file answers every question. Removes an incomplete last line, which a kill may leave."""
    text = file.read_bytes() if file.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    cut = text[len(whole) :]
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        done = {row["clip"] for row in rows if set(questions) <= row.get("answers", {}).keys()}
    except (ValueError, KeyError, TypeError, AttributeError):
        done = None
    if done is None or (cut and not cut.startswith(b'{"')):
        parser.error(f"{file} is not a file of answers: give another.")
    if cut:
        with file.open("r+b") as opened:
            opened.truncate(len(whole))
    return done


def answer_clips(model_name: str, folder: Path, file: Path, questions: list[str], fps: float, gpu_kv_gb: float) -> None:
    Sampling(fps)  # values that no video allows are refused once, and not for every clip
    tieredkv.TierConfig(gpu_kv_gb=gpu_kv_gb)
    clips = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS)
    done = answered(file, questions)
    left = [clip for clip in clips if str(clip.relative_to(folder)) not in done]
    print(f"{len(clips)} clips, {len(clips) - len(left)} of them already answered")
    if not left:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(model_name, dtype="auto", device_map=device).eval()
    processor = AutoProcessor.from_pretrained(model_name)
    with file.open("a") as out:
        for clip in left:
            row: dict[str, Any] = {"clip": str(clip.relative_to(folder))}
            try:
                with tieredkv.open_session(model, clip, processor=processor, fps=fps, gpu_kv_gb=gpu_kv_gb) as session:
                    answers = {question: session.ask(question, max_new_tokens=128) for question in questions}
                    peak = max(answer.stats.kv_device_peak_bytes for answer in answers.values())
                row["answers"] = {question: answer.text for question, answer in answers.items()}
                outcome = f"answered, with at most {peak:,} bytes of keys and values on the device"
            except (tieredkv.VideoError, tieredkv.BudgetError) as error:  # of this clip; any other error ends the run
                row["error"] = outcome = str(error)
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            print(f"{row['clip']}: {outcome}")


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
            if arguments.clips or arguments.model:
                parser.error("--tiny has its own model, clips and questions: leave them out, or --tiny.")
            import little_video as little

            with tempfile.TemporaryDirectory() as folder:
                clips = Path(folder, "clips")
                clips.mkdir()
                _, questions = little.make_video(clips, seed=7)
                little.make_video(clips, seed=10)
                (clips / "broken.mp4").write_bytes(b"no video")
                file = Path(folder, "answers.jsonl")
                for _ in range(2):  # the second time, only the broken clip is tried
                    answer_clips(little.MODEL, clips, file, questions, *given(little.FPS, little.GPU_KV_GB))
                print(file.read_text(), end="")
            return
        if not arguments.questions:
            parser.error("give a folder of clips, a .jsonl file and at least one question, or --tiny.")
        if not arguments.clips.is_dir():
            parser.error(f"{arguments.clips} is not a folder: give the one with the clips.")
        options = given(1.0, 2.0)
        answer_clips(arguments.model or MODEL, arguments.clips, arguments.answers, arguments.questions, *options)
    except tieredkv.TieredKVError as error:
        parser.error(str(error))
    except OSError as error:  # no such model, or a file of answers that cannot be written
        parser.error(str(error).splitlines()[0])
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
