"""A list of questions about one video, which is ingested once; the answers go to a CSV or JSON lines file.

    python examples/many_questions.py film.mp4 questions.txt answers.csv -m Qwen/Qwen2.5-VL-3B-Instruct
    python examples/many_questions.py --tiny    the bundled model and a video of its own, on any machine

questions.txt has one question per line. Each answer is written as soon as it is complete.
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path

import tieredkv

COLUMNS = ["question", "answer", "seconds", "tokens"]

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("video", nargs="?")
parser.add_argument("questions", nargs="?", type=Path, help="a text file, one question per line")
parser.add_argument("answers", nargs="?", type=Path, help="a new file that ends in .csv or .jsonl")
parser.add_argument("--model", "-m", help=f"a path or hub id [{MODEL}]")
parser.add_argument("--fps", type=float, help="frames sampled per second [1; with --tiny 4]")
parser.add_argument("--gpu-kv-gb", type=float, help="GiB of the device for keys and values [2; with --tiny 0.002]")
parser.add_argument("--tiny", action="store_true", help="the bundled model, and a video of its own")


def answer_all(model: str, video: str, questions: list[str], answers: Path, fps: float, gpu_kv_gb: float) -> None:
    with (
        tieredkv.open_session(model, video, fps=fps, gpu_kv_gb=gpu_kv_gb, progress=True) as session,
        answers.open("x", newline="") as file,
    ):
        table = csv.DictWriter(file, COLUMNS)
        if answers.suffix == ".csv":
            table.writeheader()
        for question in questions:
            answer = session.ask(question, max_new_tokens=128)
            stats = answer.stats
            seconds = stats.ttft_s + (stats.new_tokens - 1) * (stats.tpot_ms or 0) / 1000
            values = (question, answer.text, round(seconds, 3), stats.new_tokens)
            row = dict(zip(COLUMNS, values, strict=True))
            if answers.suffix == ".csv":
                table.writerow(row)
            else:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
        print(f"{len(questions)} answers after {session.ingest_s:.1f} s of ingest")
        print(f"at most {stats.kv_device_peak_bytes:,} of {stats.kv_full_bytes:,} bytes on the device")


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
            if arguments.video or arguments.model:
                parser.error("--tiny has its own model, video and questions: leave them out, or --tiny.")
            import little_video as little

            with tempfile.TemporaryDirectory() as folder:
                video, questions = little.make_video(Path(folder))
                answers = Path(folder) / "answers.csv"
                answer_all(little.MODEL, video, questions, answers, *given(little.FPS, little.GPU_KV_GB))
                print(answers.read_text(), end="")
            return
        if arguments.answers is None or arguments.answers.suffix not in (".csv", ".jsonl"):
            parser.error("give a video, a file of questions and a new .csv or .jsonl file, or --tiny.")
        if arguments.answers.exists() or not arguments.answers.parent.is_dir():
            parser.error(f"{arguments.answers} exists already, or its folder does not: give the name of a new file.")
        questions = [line.strip() for line in arguments.questions.read_text().splitlines() if line.strip()]
        if not questions:
            parser.error(f"{arguments.questions} holds no question: write one per line.")
        options = given(1.0, 2.0)
        answer_all(arguments.model or MODEL, arguments.video, questions, arguments.answers, *options)
    except UnicodeDecodeError:
        parser.error(f"{arguments.questions} is not a text file.")
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}.")
    except tieredkv.TieredKVError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
