"""Several policies, the same video and questions: answers, memory and seconds side by side.

    python examples/compare_policies.py film.mp4 "What is on the table?" -m Qwen/Qwen2.5-VL-3B-Instruct
    python examples/compare_policies.py --tiny    the bundled model and a video of its own, on any machine

The video is ingested once; its saved session is then loaded under each policy. `tieredkv policies` describes the
policies. A few questions prove little: benchmarks/quality.py asks hundreds.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor

import tieredkv

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("video", nargs="?")
parser.add_argument("questions", nargs="*")
parser.add_argument(
    "--policies", default="hybridkv,arkvale,snapkv,streaming,full", help="names, separated by commas [%(default)s]"
)
parser.add_argument("--model", "-m", help=f"a path or hub id [{MODEL}]")
parser.add_argument("--fps", type=float, help="frames sampled per second [1; with --tiny 4]")
parser.add_argument("--gpu-kv-gb", type=float, help="GiB of the device for keys and values [2; with --tiny 0.002]")
parser.add_argument("--tiny", action="store_true", help="the bundled model, and a video of its own")


def compare(
    name: str, video: str, questions: list[str], policies: list[str], folder: Path, fps: float, gpu_kv_gb: float
) -> Table:
    for policy in policies:
        tieredkv.TierConfig(policy=policy)  # an unknown name is refused before anything is loaded
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map=device).eval()
    processor = AutoProcessor.from_pretrained(name)
    saved = folder / "session.tkv"
    with tieredkv.open_session(
        model, video, processor=processor, fps=fps, gpu_kv_gb=gpu_kv_gb, progress=True
    ) as session:
        session.save(saved)

    table = Table("policy", *questions, "on the device, MiB", "seconds per answer")
    for policy in policies:
        with tieredkv.load_session(saved, model, processor=processor, policy=policy) as session:
            try:
                session.ask(questions[0], max_new_tokens=1)  # reads the file, and computes the policy's digests
                answers = [session.ask(question, max_new_tokens=64) for question in questions]
            except tieredkv.BudgetError as error:  # `full` fits only if everything does
                table.add_row(policy, str(error))
                continue
        seconds = [one.stats.ttft_s + (one.stats.new_tokens - 1) * (one.stats.tpot_ms or 0) / 1000 for one in answers]
        peak = answers[-1].stats.kv_device_peak_bytes / 2**20
        texts = [answer.text for answer in answers]
        table.add_row(policy, *texts, f"{peak:.3g}", f"{sum(seconds) / len(seconds):.3g}")
    return table


def main() -> None:
    arguments = parser.parse_args()

    def given(fps: float, gpu_kv_gb: float) -> tuple[float, float]:
        """--fps and --gpu-kv-gb, or these."""
        return (
            fps if arguments.fps is None else arguments.fps,
            gpu_kv_gb if arguments.gpu_kv_gb is None else arguments.gpu_kv_gb,
        )

    policies = arguments.policies.split(",")
    if arguments.tiny and (arguments.video or arguments.model):
        parser.error("--tiny has its own model, video and questions: leave them out, or --tiny.")
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if arguments.tiny:
                import little_video as little

                video, questions = little.make_video(folder)
                table = compare(little.MODEL, video, questions, policies, folder, *given(little.FPS, little.GPU_KV_GB))
            elif arguments.questions:
                options = given(1.0, 2.0)
                table = compare(
                    arguments.model or MODEL, arguments.video, arguments.questions, policies, folder, *options
                )
            else:
                parser.error("give a video and at least one question, or --tiny.")
        Console().print(table)
    except tieredkv.TieredKVError as error:
        parser.error(str(error))
    except OSError as error:  # no such model
        parser.error(str(error).splitlines()[0])


if __name__ == "__main__":
    main()
