"""Questions about a long video on a 12 GB card: Qwen2.5-VL-3B-Instruct in bfloat16, or 7B with 4-bit weights.

    python examples/long_video_qa_12gb.py film.mp4 "What is on the table?" "Who comes in last?"
    python examples/long_video_qa_12gb.py --quantize 4bit film.mp4 "What is on the table?"
    python examples/long_video_qa_12gb.py --tiny    the bundled model and a video of its own, on any machine

The 3B model's weights take 7.0 GiB. --quantize 4bit loads the 7B model through transformers' BitsAndBytesConfig, in
about 6.7 GiB, and needs `pip install bitsandbytes`; the vision tower and the embeddings stay in bfloat16. Keys and
values take at most 2 GiB on the card; the complete cache is in host memory, in 8 bits. The plan shows the size of the
weights before quantisation.
"""

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

import tieredkv

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("video", nargs="?")
parser.add_argument("questions", nargs="*")
parser.add_argument("--quantize", choices=["4bit"], help="the 7B model with 4-bit weights")
parser.add_argument("--fps", type=float, help="frames sampled per second [1; with --tiny 4]")
parser.add_argument("--gpu-kv-gb", type=float, help="GiB of the card for keys and values [2; with --tiny 0.002]")
parser.add_argument("--tiny", action="store_true", help="the bundled model, and a video of its own")


def four_bits() -> BitsAndBytesConfig:
    """4-bit weights for the decoder; the vision tower and the output layer unchanged."""
    if find_spec("bitsandbytes") is None:
        parser.error("--quantize 4bit needs bitsandbytes: pip install bitsandbytes.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )


def run(name: str, quantize: str | None, video: str, questions: list[str], fps: float, gpu_kv_gb: float) -> None:
    options = {"quantization_config": four_bits()} if quantize else {}
    print(tieredkv.plan(name, video, fps=fps, gpu_kv_gb=gpu_kv_gb, card="RTX 3060"))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.bfloat16, device_map=device, **options).eval()
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
                video, questions = little.make_video(Path(folder))
                run(little.MODEL, arguments.quantize, video, questions, *given(little.FPS, little.GPU_KV_GB))
        elif arguments.questions:
            name = f"Qwen/Qwen2.5-VL-{'7B' if arguments.quantize else '3B'}-Instruct"
            video, questions = arguments.video, arguments.questions
            run(name, arguments.quantize, video, questions, *given(1.0, 2.0))
        else:
            parser.error("give a video and at least one question, or --tiny.")
    except tieredkv.TieredKVError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
