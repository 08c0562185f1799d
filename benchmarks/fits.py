"""What fits a consumer card: the longest video that can be asked about within 24 and 12 GiB, with and without tieredkv.

    python benchmarks/fits.py            on a CUDA device with at least as much memory; minutes
    python benchmarks/fits.py --quick    a small model, one length; runs on a CPU too (--device cpu)

Qwen2.5-VL's shapes with random weights in bf16, 7B within 24 GiB and 3B within 12, vision tower included; frames are
noise of 280 x 280 pixels, 100 tokens for every two. Each case is a process of its own whose allocator is limited to the
card's memory (`set_per_process_memory_fraction`), not counting that of the driver. Stock: the processor's tensors,
`model.generate`, transformers' cache. Prints the outcome and peak of each case, and one line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import origin, report
from synthetic import SHAPES

from tieredkv.memory.units import GIB

SIDE = 280
STEP_TOKENS = (SIDE // 28) ** 2
NEW_TOKENS = 16
CASES = (("7b", 24.0), ("3b", 12.0))


def make_video_model(shape: str, device: str) -> tuple[Any, Any]:
    """A Qwen2.5-VL of the given shape with random weights, and a processor for it."""
    from transformers import (
        GenerationConfig,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    from tieredkv.tiny.processor import CHAT_TEMPLATE, TOKEN, build_tokenizer

    text = SHAPES[shape]
    section = [16, 24, 24] if shape != "tiny" else [4, 6, 6]
    vision = {"hidden_size": 1280, "out_hidden_size": text["hidden_size"], "tokens_per_second": 2}
    if shape == "tiny":
        vision |= {
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "fullatt_block_indexes": [1],
        }
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            "max_position_embeddings": 2**20,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            "bos_token_id": None,
            "eos_token_id": TOKEN["<|im_end|>"],
            "pad_token_id": TOKEN["<|endoftext|>"],
        },
        vision_config=vision,
        image_token_id=TOKEN["<|image_pad|>"],
        video_token_id=TOKEN["<|video_pad|>"],
        vision_start_token_id=TOKEN["<|vision_start|>"],
        vision_end_token_id=TOKEN["<|vision_end|>"],
    )
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16 if device != "cpu" else torch.float32)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    model.generation_config = GenerationConfig(
        pad_token_id=TOKEN["<|endoftext|>"], eos_token_id=TOKEN["<|im_end|>"], do_sample=False
    )
    size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(
            size=size, do_sample_frames=False, max_frames=10_000_000, cap_pixels_per_frame=False
        ),
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def run_tiered(model: Any, processor: Any, frames: np.ndarray, cap: float) -> dict[str, Any]:
    """Ingest and two answers; reports the second."""
    import tieredkv

    with tieredkv.open_session(model, frames, processor=processor, fps=2, gpu_kv_gb=cap) as session:
        for _ in range(2):  # the first compiles
            answer = session.ask("what colour was the star ?", max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    stats = answer.stats
    kept = ("prompt_tokens", "kv_device_peak_bytes", "kv_host_bytes", "ingest_s", "ttft_s", "tpot_ms", "decode_path")
    return {name: getattr(stats, name) for name in kept}


def run_stock(model: Any, processor: Any, frames: np.ndarray) -> dict[str, Any]:
    """The processor's tensors and `model.generate`."""
    question = {"type": "text", "text": "what colour was the star ?"}
    messages = [{"role": "user", "content": [{"type": "video"}, question]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    metadata = {"fps": 2, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
    inputs = processor(
        text=[text],
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        video_metadata=[[metadata]],
        return_tensors="pt",
    ).to(model.device)
    model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return {"prompt_tokens": inputs["input_ids"].shape[1]}


def where(error: BaseException) -> str:
    """The innermost function of transformers or tieredkv in an error's traceback."""
    names = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "transformers" in code.co_filename or "tieredkv" in code.co_filename:
            names.append(f"{Path(code.co_filename).name}:{code.co_name}")
        trace = trace.tb_next
    return names[-1] if names else "before the model"


def run_one(shape: str, card: float, tokens: int, kind: str, device: str) -> dict[str, Any]:
    """One case, in this process."""
    if device != "cpu":
        share = card * GIB / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))  # a card "of 24 GiB" has less
    frames = np.random.default_rng(0).integers(0, 255, (2 * tokens // STEP_TOKENS, SIDE, SIDE, 3), dtype=np.uint8)
    begin = time.perf_counter()
    row: dict[str, Any] = {"shape": shape, "card_gib": card, "tokens": tokens, "kind": kind}
    with torch.inference_mode():
        model, processor = make_video_model(shape, device)
        if device != "cpu":
            row["weights_bytes"] = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        try:
            if kind == "stock":
                row |= run_stock(model, processor, frames)
            else:
                row |= run_tiered(model, processor, frames, cap=card / 12)
        except torch.OutOfMemoryError as error:
            row |= {"error": "out of memory", "where": where(error)}
        if device != "cpu":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
            row["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return {**row, "seconds": time.perf_counter() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 131072, 262144])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--quick", action="store_true", help="a small model and one length")
    parser.add_argument("--one", nargs=4, metavar=("SHAPE", "CARD", "TOKENS", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: give --device cpu, with --quick, to see that it runs")
    if arguments.one:
        shape, card, tokens, kind = arguments.one
        print(json.dumps(run_one(shape, float(card), int(tokens), kind, arguments.device)))
        return
    cases = [("tiny", 1.0)] if arguments.quick else list(CASES)
    lengths = [2000] if arguments.quick else sorted(arguments.tokens)
    rows = []
    for shape, card in cases:
        for kind in ("stock", "tiered"):
            for tokens in lengths:
                command = [sys.executable, __file__, "--device", arguments.device]
                command += ["--one", shape, str(card), str(tokens), kind]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    row = {"shape": shape, "card_gib": card, "tokens": tokens, "kind": kind, "error": "failed"}
                else:
                    row = json.loads(done.stdout.splitlines()[-1])
                rows.append(row)
                peak = f"peak {row['peak_bytes'] / GIB:.2f} GiB" if "peak_bytes" in row else ""
                outcome = (
                    f"{row['error']} {row.get('where', '')}" if "error" in row else f"fits, {row['seconds']:.1f} s"
                )
                print(f"{shape} under {card:g} GiB, {tokens:>8,} tokens, {kind:<7} {outcome} {peak}", flush=True)
                if "error" in row:
                    break  # a longer one would fail too
    result = {"benchmark": "fits", **origin(), "rows": rows}
    report(result, arguments.out)


if __name__ == "__main__":
    main()
