"""Bytes of host chunks in 16, 8 and 4 bits: host memory, link, session file, and time.

    python benchmarks/bytes.py                    minutes
    python benchmarks/bytes.py --quick            small shapes and a short film, as a check that it runs
    python benchmarks/bytes.py --models 7b --layers 2

Each model watches a generated film under a cap that holds a part of the cache, three times: with `host_kv_bits` of 16,
which stands for the model's own dtype, 8 and 4, all else equal. The models are the bundled one, in the float32 that it
computes in and in bfloat16, and one with the text layers of Qwen2.5-VL-7B, a few of them, random weights, bfloat16.
Ingests are done in turn, and so are answers, each time with all three settings; times are medians, of ingests and of
steps. All settings are made to say what the first one said, so that all take the same steps.

Prints a table, whose shares are of the row with 16 bits, and ends with one line of JSON, a row per model and setting:
`host_bytes` of keys and values; `link_bytes_per_token`, copied to the device in a decoding step; `file_bytes` of the
saved session, of which `digest_bytes` are digests, the same for all; `decode_ms` per token; `ingest_s`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from origin import origin, report, rounded  # before torch: it sets how torch's threads wait

# isort: split
import torch

import tieredkv
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.tiny import model as tiny
from tieredkv.tiny.evaluate import TOKENS_PER_SECOND
from tieredkv.tiny.scene import make_scene, questions
from tieredkv.tiny.video import write_video

BITS = (16, 8, 4)
MODELS = ("bundled", "bundled-bf16", "7b")
FIGURES = ("host_bytes", "link_bytes_per_token", "file_bytes", "decode_ms", "ingest_s")
RESULT = Path(__file__).parent / "results" / "bytes-cpu.json"
SEED = 1_400_000


class Say:
    """A logits processor that makes a model say given tokens, one after another, and times the steps between them."""

    def __init__(self, token_ids: list[int]) -> None:
        self._left: Iterator[int] = iter(token_ids)
        self._times: list[float] = []

    @property
    def milliseconds(self) -> list[float]:
        """Of each step."""
        return [1000 * (after - before) for before, after in itertools.pairwise(self._times)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._times.append(time.perf_counter())
        wanted = torch.full_like(scores, -torch.inf)
        wanted[:, next(self._left)] = 0
        return wanted


def large_model(layers: int, quick: bool) -> Any:
    """The bundled model's vision tower and vocabulary with text layers of Qwen2.5-VL-7B's shape; random weights."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = tiny.build_config()
    text = config.text_config
    text.num_hidden_layers = layers
    text.layer_types = ["full_attention"] * layers
    text.hidden_size, text.intermediate_size = (512, 512) if quick else (3584, 18944)
    text.num_attention_heads, text.num_key_value_heads = text.hidden_size // 128, 2 if quick else 4
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [16, 24, 24]}
    config.vision_config.out_hidden_size = text.hidden_size
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def load(name: str, layers: int, quick: bool) -> tuple[Any, Any]:
    """One of `MODELS`, which never ends an answer, and its processor."""
    if name == "7b":
        model, processor = large_model(layers, quick), tiny.build_processor()
    else:
        model, processor = tiny.load(torch.float32 if name == "bundled" else torch.bfloat16)
    model.generation_config.eos_token_id = None
    return model, processor


def measure(name: str, film: Path, question: str, seconds: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model."""
    model, processor = load(name, arguments.layers, arguments.quick)
    shape = model_shape(model.config, model.dtype)
    options = {
        "gpu_kv_gb": arguments.share * seconds * TOKENS_PER_SECOND * shape.token_bytes / GIB,
        "budget_ratio": arguments.budget,
        "processor": processor,
        "fps": tiny.FPS,
    }
    rows = [{"model": name, "dtype": str(model.dtype).removeprefix("torch."), "bits": bits} for bits in BITS]
    ingest_s: dict[int, list[float]] = {bits: [] for bits in BITS}
    for _ in range(arguments.ingests - 1):
        for bits in BITS:
            with tieredkv.open_session(model, film, host_kv_bits=bits, **options) as session:
                ingest_s[bits].append(session.ingest_stats.wall_s)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for bits in BITS:
            session = tieredkv.open_session(model, film, host_kv_bits=bits, **options)
            sessions[bits] = stack.enter_context(session)
            ingest_s[bits].append(session.ingest_stats.wall_s)
        said = sessions[BITS[0]].ask(question, max_new_tokens=arguments.new_tokens).token_ids
        decode_ms: dict[int, list[float]] = {bits: [] for bits in BITS}
        for number in range(arguments.rounds + 1):  # the first warms up
            for bits, row in zip(BITS, rows, strict=True):
                session = sessions[bits]
                say = Say(said)
                answer = session.ask(question, max_new_tokens=len(said), logits_processor=[say])
                assert answer.token_ids == said
                if number:
                    decode_ms[bits] += say.milliseconds
                    continue
                cache = session._cached.cache
                path = Path(folder) / "film.tkv"
                session.save(path)
                row |= {
                    "tokens": answer.stats.visual_tokens,
                    "host_bytes": answer.stats.kv_host_bytes,
                    "link_bytes_per_token": round(cache.counters.missed_bytes / (len(said) - 1)),
                    "file_bytes": path.stat().st_size,
                    "digest_bytes": sum(layer.digests.packed.nbytes for layer in cache.tiered_layers),
                    "hit_rate": answer.stats.hit_rate,
                    "device_bytes": answer.stats.kv_device_peak_bytes,
                }
                path.unlink()
        for bits, row in zip(BITS, rows, strict=True):
            row |= {"decode_ms": statistics.median(decode_ms[bits]), "ingest_s": statistics.median(ingest_s[bits])}
    for row in rows:
        row["shares"] = {figure: row[figure] / rows[0][figure] for figure in FIGURES if rows[0][figure]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--minutes", type=float, default=16, help="length of the film; 480 tokens a minute")
    parser.add_argument("--layers", type=int, default=1, help="text layers of the 7B shape")
    parser.add_argument("--share", type=float, default=0.25, help="the cap, as a share of the cache in 16 bits")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--ingests", type=int, default=3, help="ingests with each setting")
    parser.add_argument("--rounds", type=int, default=7, help="answers with each setting, after one to warm up")
    parser.add_argument("--new-tokens", type=int, default=33, help="tokens of an answer")
    parser.add_argument("--out", type=Path, help=f"also write the result here, as {RESULT} was")
    parser.add_argument("--quick", action="store_true", help="a short film and a small shape")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.minutes, arguments.share, arguments.ingests, arguments.rounds, arguments.new_tokens = 2, 0.8, 1, 1, 5
    seconds = round(60 * arguments.minutes)
    scene = make_scene(SEED, seconds, 12 if seconds > 240 else 4)
    question = max(questions(scene, SEED, 12), key=lambda one: len(one.words)).text
    print(f"{'model':>12} {'bits':>4} {'host MiB':>15} {'link KiB/token':>15} {'file MiB':>15} ", end="")
    print(f"{'ms/token':>15} {'ingest s':>15} {'hits':>6}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        film = write_video(scene, Path(folder) / "film.mp4")
        for name in arguments.models:
            for row in measure(name, film, question, seconds, arguments):
                rows.append(row)
                print(f"{name:>12} {row['bits']:>4}", end="")
                for figure, unit in zip(FIGURES, (2**20, 2**10, 2**20, 1, 1), strict=True):
                    share = f" ({row['shares'][figure]:.3f})" if figure in row["shares"] else ""
                    print(f" {f'{row[figure] / unit:.2f}{share}':>15}", end="")
                print(f" {row['hit_rate']:6.1%}" if row["hit_rate"] is not None else f" {'-':>6}", flush=True)
    result = {
        "benchmark": "bytes",
        **origin("av"),
        "threads": torch.get_num_threads(),
        "layers_7b": arguments.layers,
        "cap_share": arguments.share,
        "budget": arguments.budget,
        "rows": rounded(rows),
    }
    report(result, arguments.out)


if __name__ == "__main__":
    main()
