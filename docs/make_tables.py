"""Write the tables of docs from the planner and the policies: python docs/make_tables.py

A table stands between <!-- table: NAME --> and <!-- end --> and is replaced. Nothing depends on the machine: models are
reduced to their shapes, and host memory is taken to be unlimited.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from tieredkv.config import TierConfig
from tieredkv.memory import limits
from tieredkv.memory.units import GIB, HOST_BITS, as_gib
from tieredkv.models import families
from tieredkv.models.kv_shape import KVShape, model_shape
from tieredkv.planning import admission, forecast, host_plan, sizes
from tieredkv.policy.base import Policy
from tieredkv.policy.presets import POLICIES
from tieredkv.video.frames import Sampled

FOLDER = Path(__file__).parent
LENGTHS = (8_192, 32_768, 131_072)
FRAMES = ((10, 10), (9, 16), (13, 23))
"""Rows and columns of visual tokens."""
RATES = (0.5, 1.0, 2.0)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
QUESTION, ANSWER = 64, 256
DECODER_SHAPES = {  # layers, query heads, KV heads, hidden size
    "Qwen3-VL-2B": ("qwen3", 28, 16, 8, 2048),
    "Qwen3-VL-8B": ("qwen3", 36, 32, 8, 4096),
    "SmolLM2-135M": ("llama", 30, 9, 3, 576),
    "Llama-3.2-1B": ("llama", 16, 32, 8, 2048),
    "Llama-3.2-3B": ("llama", 28, 24, 8, 3072),
    "Llama-3.1-8B": ("llama", 32, 32, 8, 4096),
    "Qwen2.5-0.5B": ("qwen2", 24, 14, 2, 896),
    "Qwen2.5-1.5B": ("qwen2", 28, 12, 2, 1536),
    "Qwen2.5-14B": ("qwen2", 48, 40, 8, 5120),
}
QWEN3_VL = "Qwen3-VL-4B"
OLDER = {  # layers, query heads, KV heads, hidden size, inner size, vocabulary, tied embeddings
    "Qwen2.5-VL-3B": (36, 16, 2, 2048, 11_008, 151_936, True),
    "Qwen2.5-VL-7B": (28, 28, 4, 3584, 18_944, 152_064, False),
}
"""Qwen2.5-VL, from the config.json of each."""
QWEN3_5: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # radixark/miles, scripts/models/qwen3.5-4B.sh; linear attention and vision tower as other projects' tests quote its
    # config.json (vllm-metal's of hybrid models; those of loaders of Chandra, which is a tuned Qwen3.5-4B).
    "Qwen3.5-4B": (
        {"hidden_size": 2560, "intermediate_size": 9216, "tie_word_embeddings": True},
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096},
    ),
    # The defaults of transformers' Qwen3_5TextConfig (this model's, says its docstring) and Qwen3_5VisionConfig; its
    # model card has the same numbers of layers and heads, hidden and inner size.
    "Qwen3.5-9B": ({}, {}),
    # Its model card: layers, hidden and inner size, heads of both kinds; the same in THUDM/slime,
    # scripts/models/qwen3.5-27B.sh. The vision tower is transformers' default, documented for Qwen3.5-27B.
    "Qwen3.6-27B": (
        {
            "num_hidden_layers": 64,
            "hidden_size": 5120,
            "intermediate_size": 17_408,
            "num_attention_heads": 24,
            "linear_num_value_heads": 48,
        },
        {},
    ),
    # The defaults of transformers' Qwen3_5MoeTextConfig (Qwen3.5-35B-A3B's, says its docstring); its model card has the
    # same numbers, and THUDM/slime, scripts/models/qwen36-35B-A3B.sh, says so too.
    "Qwen3.6-35B-A3B": ({}, {}),
}
"""What differs from transformers' defaults in the configs of text and vision tower."""
_PHONE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12,
          "num_key_value_heads": 12, "head_dim": 64, "global_head_dim": 64, "use_clipped_linears": True}  # fmt: skip
_LARGE = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
          "num_key_value_heads": 16, "head_dim": 72, "global_head_dim": 72, "use_clipped_linears": False,
          "standardize": True}  # fmt: skip
# From src/transformers/models/gemma4/convert_gemma4_weights.py of huggingface/transformers, which wrote them.
GEMMA4: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "Gemma 4 E4B": (
        {
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 42,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 18,
        },
        _PHONE,
        True,
    ),
    "Gemma 4 26B-A4B": (
        {
            "hidden_size": 2816,
            "hidden_size_per_layer_input": 0,
            "intermediate_size": 2112,
            "num_hidden_layers": 30,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "use_bidirectional_attention": "vision",
            "enable_moe_block": True,
            "num_experts": 128,
            "moe_intermediate_size": 704,
            "top_k_experts": 8,
            "sliding_window": 1024,
        },
        _LARGE,
        False,
    ),
    "Gemma 4 31B": (
        {
            "hidden_size": 5376,
            "hidden_size_per_layer_input": 0,
            "intermediate_size": 21_504,
            "num_hidden_layers": 60,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
            "attention_k_eq_v": True,
            "use_bidirectional_attention": "vision",
            "sliding_window": 1024,
        },
        _LARGE,
        False,
    ),
}
"""The same, and whether there is an audio tower, of transformers' default size. Every sixth layer has full attention,
with heads of 512, as by default."""


def video_config(name: str) -> Any:
    """The config of a published video model, as far as sizes depend on it."""
    if name in QWEN3_5:
        return _qwen3_5(name)
    if name in GEMMA4:
        return _gemma4(name)
    if name == QWEN3_VL:
        return _qwen3_vl()
    from transformers import Qwen2_5_VLConfig

    layers, heads, kv_heads, hidden, inner, vocabulary, tied = OLDER[name]
    text = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "out_hidden_size": hidden}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)


def _qwen3_5(name: str) -> Any:
    from transformers import Qwen3_5Config, Qwen3_5MoeConfig

    text, vision = QWEN3_5[name]
    kind: Any = Qwen3_5MoeConfig if "A3B" in name else Qwen3_5Config
    hidden = kind(text_config=text).text_config.hidden_size
    tied = text.get("tie_word_embeddings", False)
    return kind(text_config=text, vision_config={**vision, "out_hidden_size": hidden}, tie_word_embeddings=tied)


def _gemma4(name: str) -> Any:
    from transformers import Gemma4AudioConfig, Gemma4Config

    text, vision, hears = GEMMA4[name]
    audio = Gemma4AudioConfig() if hears else None
    return Gemma4Config(text_config=text, vision_config=vision, audio_config=audio)


def _qwen3_vl() -> Any:
    """Of the 4B, by its published sizes, which come to 4.44 billion parameters."""
    from transformers import Qwen3VLConfig

    text = {
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "out_hidden_size": 2560,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


VIDEO_MODELS = (*QWEN3_5, *GEMMA4, *OLDER, QWEN3_VL)
HOURS_32 = ("Qwen3.5-4B", "Qwen3.5-9B", "Qwen3.6-27B", "Qwen3.6-35B-A3B", QWEN3_VL)
"""Models in the table of an hour that turn 32 x 32 pixels into a token."""
PLANNED = ("Qwen3.5-9B", *OLDER, QWEN3_VL)
"""Models with a table of plans."""

TWELVE = (("Qwen2.5-VL-3B", None), (QWEN3_VL, "4bit"), ("Qwen3.5-4B", None), ("Qwen3.5-9B", "4bit"))
"""Models on a card of 12 GB, and how weights are loaded."""
FILM = Sampled(3600, 1080, 1920, fps=1.0, start=0.0, seconds=3600.0, max_pixels=448 * 252)
"""An hour of 1080p at one frame a second, and its `max_pixels`."""
STEPS = (
    ("RTX 4090", "Qwen2.5-VL-7B", None),
    ("RTX 4090", "Qwen2.5-VL-7B", 2.0),
    ("RTX 3060", "Qwen2.5-VL-3B", None),
    ("RTX 3060", "Qwen2.5-VL-3B", 1.0),
    ("RTX 4060 Ti 16GB", QWEN3_VL, None),
)
"""Card, model and cap in GiB of predicted steps; None: what the card has left."""
BOUNDS = {"nothing": "nothing", "memory": "the cap", "link": "the link", "floor": "the least share, 5 %"}
SPARE = 1.5
"""GiB for activations and the driver: a round figure, not measured."""


def text_config(name: str) -> Any:
    """The config of a decoder, as far as the size of its cache depends on it."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    kind, layers, heads, kv_heads, hidden = DECODER_SHAPES[name]
    return {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind](
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=hidden
    )


def rows(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table; all columns but the first hold numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.3g}"


def per_token() -> str:
    """Size of a full cache in 16 bits, by model and length."""
    shapes = {name: model_shape(video_config(name), torch.bfloat16) for name in VIDEO_MODELS}
    shapes |= {name: model_shape(text_config(name), torch.bfloat16) for name in DECODER_SHAPES}
    header = ["model", "tiered layers", "KV heads", "head dim", "KiB per token"]
    header += [*(f"{n:,} tokens, GiB" for n in LENGTHS), "other layers, MiB"]
    body = []
    for name, one in shapes.items():
        others = sum(sizes.untiered_bytes(one, LENGTHS[-1], 1).values()) / 2**20
        row = [name, str(one.num_layers), str(one.num_key_value_heads), str(one.head_dim)]
        row += [f"{one.token_bytes / 1024:g}", *(gib(tokens * one.token_bytes) for tokens in LENGTHS)]
        body.append([*row, f"{others:.3g}" if others else ""])
    return rows(header, body)


def host_bytes(shape: KVShape, tiers: TierConfig, prompt: int) -> int:
    """Host memory of a prompt, in the bits that are its default."""
    return sizes.host_bytes(shape, tiers, prompt, host_plan.prompt_bits(shape, tiers, prompt))


def per_hour(names: tuple[str, ...] = tuple(OLDER), patch: int = 28) -> str:
    """Visual tokens of an hour of video, and the host memory of its cache in 8 bits.

    patch: side, in pixels, of the square of two frames that becomes one visual token.
    """
    tiers = TierConfig(host_kv_bits=8)
    shapes = {name: model_shape(video_config(name), torch.bfloat16) for name in names}
    body = []
    for height, width in ((rows * patch, columns * patch) for rows, columns in FRAMES):
        for fps in RATES:
            tokens = round(3600 * fps / 2) * (height // patch) * (width // patch)
            prompt = forecast.HEAD_TOKENS + tokens + QUESTION
            cells = [gib(host_bytes(shape, tiers, prompt)) for shape in shapes.values()]
            body.append([f"{width} x {height}", f"{fps:g}", f"{tokens:,}", *cells])
    return rows(["frames", "per second", "tokens an hour", *(f"{name}, GiB" for name in shapes)], body)


def weights() -> str:
    """What the weights take in 16 bits, and quantised."""
    body = []
    for name in VIDEO_MODELS:
        cells = []
        for quantisation in (None, FP8, "4bit"):
            config = video_config(name)
            if quantisation is FP8:
                config.quantization_config = FP8
            plan = forecast.plan(config, 1000, weights="4bit" if quantisation == "4bit" else None)
            if quantisation is None:
                cells += [gib(plan.decoder_bytes), gib(plan.vision_bytes)]
            cells.append(gib(plan.decoder_bytes + plan.vision_bytes))
            if quantisation is None:
                cells.append(gib(plan.step_weight_bytes))
        body.append([name, *cells])
    header = ["model", "decoder, GiB", "vision tower, GiB", "together, GiB", "a step reads, GiB", "in FP8, GiB"]
    return rows([*header, "in 4 bits, GiB"], body)


def plans() -> str:
    """What `tieredkv plan` says of some lengths under some caps."""
    body = []
    for name in PLANNED:
        config = video_config(name)
        shape = model_shape(config, torch.bfloat16)
        for tokens in (32_768, 131_072, 262_144):
            prompt = forecast.HEAD_TOKENS + tokens + QUESTION
            layout = sizes.lay_out(TierConfig(), prompt, QUESTION, ANSWER)
            least = admission.smallest_cap_bytes(shape, TierConfig(), layout, QUESTION)
            for cap in (1.0, 2.0, 4.0):
                host = host_bytes(shape, TierConfig(gpu_kv_gb=cap), prompt)
                row = [name, f"{tokens:,}", gib(host), as_gib(least), f"{cap:g}"]
                if cap * GIB < least:
                    body.append([*row, "refused", ""])
                    continue
                plan = forecast.plan(config, tokens, gpu_kv_gb=cap, question_tokens=QUESTION, max_new_tokens=ANSWER)
                share = min(1.0, plan.dynamic_tokens / (prompt + ANSWER))
                body.append([*row, f"{plan.dynamic_tokens:,} ({share:.0%})", gib(plan.prefill_copy_bytes)])
    header = ["model", "visual tokens", "host, GiB", "least cap, GiB", "cap, GiB", "tokens a step attends to"]
    return rows([*header, "prefill copies, GiB"], body)


def bits() -> str:
    """What the bits of the host tier change, for one length under one cap."""
    body = []
    for name in PLANNED:
        config = video_config(name)
        for host_bits in HOST_BITS:
            plan = forecast.plan(config, 131_072, gpu_kv_gb=2, host_kv_bits=host_bits, question_tokens=QUESTION)
            share = min(1.0, plan.dynamic_tokens / (plan.prompt_tokens + plan.new_tokens))
            row = [name, f"{host_bits}", gib(plan.host_bytes), gib(plan.file_bytes), gib(plan.prefill_copy_bytes)]
            body.append([*row, f"{plan.dynamic_tokens:,} ({share:.0%})", f"{plan.step_copy_bytes / 2**20:.3g}"])
    header = ["model", "bits", "host, GiB", "session file, GiB", "prefill copies, GiB", "tokens a step attends to"]
    return rows([*header, "a step copies at most, MiB"], body)


def steps() -> str:
    """What a step of 131,072 tokens attends to and how long it takes, as predicted, by card and link."""
    body = []
    for card, name, cap in STEPS:
        for link in ("pcie5x16", "pcie4x16", "pcie4x8", "pcie3x16"):
            config, tokens = video_config(name), 131_072
            plan = forecast.plan(config, tokens, gpu_kv_gb=cap, card=card, link=link, question_tokens=QUESTION)
            step = plan.step
            assert step.time is not None
            share = min(1.0, plan.dynamic_tokens / (plan.prompt_tokens + plan.new_tokens))
            row = [f"{card}, {name}", f"{as_gib(plan.cap_bytes)}", link, BOUNDS[step.bound]]
            row += [f"{plan.dynamic_tokens:,} ({share:.0%})", "" if step.hit_rate is None else f"{step.hit_rate:.0%}"]
            row += [f"{step.copied_bytes / 2**20:.3g}", f"{step.time.link:.3g}"]
            row += [f"{step.time.prediction:.3g}" if step.ahead else ""]
            body.append([*row, f"{step.time.total:.3g}", f"{step.model_ms:.3g}"])
    header = ["card and model", "cap, GiB", "link", "limited by", "tokens a step attends to", "hits, assumed"]
    header += ["copied, MiB", "copies, ms", "predicting, ms"]
    return rows([*header, "ms per token", "the model alone, ms"], body)


def film_grid(name: str) -> tuple[int, int, int]:
    """Steps, rows and columns of visual tokens of that film, as the family resizes its frames."""
    from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    config = video_config(name)
    kind: Any = Qwen2VLVideoProcessor if name in OLDER else Qwen3VLVideoProcessor
    processor = SimpleNamespace(video_processor=kind())
    return families.video_family(config).frame_grid(config, processor, FILM)


def twelve_gb() -> str:
    """What an hour takes at one frame a second of at most 448 x 252 pixels, planned for an RTX 3060 on PCIe 4.0 x16."""
    body = []
    for name, kind in TWELVE:
        config, grid, edge = video_config(name), film_grid(name), 28 if name in OLDER else 32
        tokens = math.prod(grid)
        plan = forecast.plan(config, tokens, weights=kind, card="RTX 3060", link="pcie4x16", question_tokens=QUESTION)
        assert plan.step.time is not None
        row = [name, kind or "16 bits", gib(plan.decoder_bytes + plan.vision_bytes)]
        row += [f"{grid[2] * edge} x {grid[1] * edge}", f"{tokens:,}", gib(plan.cap_bytes), gib(plan.full_bytes)]
        row += [gib(plan.host_bytes), gib(plan.prefill_copy_bytes), f"{plan.prefill_copy_s:.3g}"]
        body.append([*row, f"{plan.dynamic_tokens:,}", f"{plan.step.time.total:.3g}"])
    header = ["model", "weights", "weights, GiB", "frames", "visual tokens", "cap, GiB", "full cache, GiB"]
    header += ["host and session file, GiB", "prefill copies, GiB", "copies, s", "tokens a step attends to"]
    return rows([*header, "ms per token, predicted"], body)


def fits() -> str:
    """Tokens whose cache fits in what a card has left beside the weights, less `SPARE` GiB for activations."""
    body = []
    for name, kind in (
        ("Qwen2.5-VL-3B", None),
        (QWEN3_VL, None),
        (QWEN3_VL, "4bit"),
        ("Qwen3.5-4B", None),
        ("Qwen3.5-9B", "4bit"),
    ):
        config = video_config(name)
        plan = forecast.plan(config, 1000, weights=kind)
        for card in (12, 16, 24):
            left = card * GIB - plan.decoder_bytes - plan.vision_bytes - SPARE * GIB
            counts = [f"{int(left * 16 / bits / plan.shape.token_bytes):,}" for bits in (16, 8, 4)]
            body.append([name, kind or "16 bits", f"{card}", *counts])
    return rows(["model", "weights", "card, GiB", "bf16 cache", "8 bits", "4 bits"], body)


def heads(policy: Policy) -> str:
    """Which heads are static, in a few words."""
    if policy.keep_all:
        return "everything on the device"
    return "all static" if policy.theta <= 0 else "all dynamic" if policy.theta > 1 else "both"


def policies() -> str:
    """A row for each policy, then a section for each."""
    header = "| policy | heads | chunks are ranked by | from |\n|---|---|---|---|"
    lines = [header]
    for name, one in POLICIES.items():
        ranked = one.theta > 0 and not one.keep_all
        lines.append(f"| `{name}` | {heads(one)} | {one.digest if ranked else ''} | {one.source} |")
    sections = [f"## {name}\n\n{one.summary}\n\n*{one.source}*" for name, one in POLICIES.items()]
    return "\n".join(lines) + "\n\n" + "\n\n".join(sections)


TABLES: dict[str, Callable[[], str]] = {
    "per-token": per_token,
    "per-hour": per_hour,
    "per-hour-32": partial(per_hour, HOURS_32, 32),
    "weights": weights,
    "plans": plans,
    "bits": bits,
    "steps": steps,
    "policies": policies,
    "twelve-gb": twelve_gb,
    "fits": fits,
}
PAGES = ("memory-sizes.md", "policies.md", "twelve-gb.md")


def filled(page: str) -> str:
    """The text of a page with its tables up to date."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    with patch.object(limits, "available_host_bytes", lambda: 2**60):
        return re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> None:
    for name in PAGES:
        path = FOLDER / name
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
