"""Write the tables of memory-sizes.md and policies.md from the planner and the policies: python docs/make_tables.py

A table stands between <!-- table: NAME --> and <!-- end --> and is replaced. Nothing depends on the machine: models are
reduced to their shapes, and host memory is taken to be unlimited.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tieredkv.config import TierConfig
from tieredkv.memory import limits
from tieredkv.memory.units import GIB, as_gib
from tieredkv.models.kv_shape import model_shape
from tieredkv.planning import admission, forecast, sizes
from tieredkv.policy.base import Policy
from tieredkv.policy.presets import POLICIES

FOLDER = Path(__file__).parent
LENGTHS = (8_192, 32_768, 131_072)
FRAMES = ((280, 280), (252, 448), (364, 644))
RATES = (0.5, 1.0, 2.0)
PATCH = 28
"""Side, in pixels, of the square of two frames that becomes one visual token of Qwen2.5-VL."""
QUESTION, ANSWER = 64, 256
DECODER_SHAPES = {  # layers, query heads, KV heads, hidden size
    "Qwen3-VL-2B": ("qwen3", 28, 16, 8, 2048),
    "Qwen3-VL-4B": ("qwen3", 36, 32, 8, 2560),
    "Qwen3-VL-8B": ("qwen3", 36, 32, 8, 4096),
    "SmolLM2-135M": ("llama", 30, 9, 3, 576),
    "Llama-3.2-1B": ("llama", 16, 32, 8, 2048),
    "Llama-3.2-3B": ("llama", 28, 24, 8, 3072),
    "Llama-3.1-8B": ("llama", 32, 32, 8, 4096),
    "Qwen2.5-0.5B": ("qwen2", 24, 14, 2, 896),
    "Qwen2.5-1.5B": ("qwen2", 28, 12, 2, 1536),
    "Qwen2.5-14B": ("qwen2", 48, 40, 8, 5120),
}
VIDEO_SHAPES = {  # layers, query heads, KV heads, hidden size, inner size, vocabulary, tied embeddings
    "Qwen2.5-VL-3B": (36, 16, 2, 2048, 11_008, 151_936, True),
    "Qwen2.5-VL-7B": (28, 28, 4, 3584, 18_944, 152_064, False),
}


def video_config(name: str) -> Any:
    """The config of a published video model, as far as sizes depend on it."""
    from transformers import Qwen2_5_VLConfig

    layers, heads, kv_heads, hidden, inner, vocabulary, tied = VIDEO_SHAPES[name]
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
    shapes = {name: model_shape(video_config(name), torch.bfloat16) for name in VIDEO_SHAPES}
    shapes |= {name: model_shape(text_config(name), torch.bfloat16) for name in DECODER_SHAPES}
    header = ["model", "layers", "KV heads", "head dim", "KiB per token", *(f"{n:,} tokens, GiB" for n in LENGTHS)]
    body = [
        [name, str(one.num_layers), str(one.num_key_value_heads), str(one.head_dim), f"{one.token_bytes / 1024:g}"]
        + [gib(tokens * one.token_bytes) for tokens in LENGTHS]
        for name, one in shapes.items()
    ]
    return rows(header, body)


def per_hour() -> str:
    """Visual tokens of an hour of video, and the host memory of its cache."""
    tiers = TierConfig()
    shapes = {name: model_shape(video_config(name), torch.bfloat16) for name in VIDEO_SHAPES}
    body = []
    for height, width in FRAMES:
        for fps in RATES:
            tokens = round(3600 * fps / 2) * (height // PATCH) * (width // PATCH)
            prompt = forecast.HEAD_TOKENS + tokens + QUESTION
            cells = [gib(sizes.host_bytes(shape, tiers, prompt)) for shape in shapes.values()]
            body.append([f"{width} x {height}", f"{fps:g}", f"{tokens:,}", *cells])
    return rows(["frames", "per second", "tokens an hour", *(f"{name}, GiB" for name in shapes)], body)


def weights() -> str:
    """What the weights take in 16 bits."""
    body = []
    for name in VIDEO_SHAPES:
        plan = forecast.plan(video_config(name), 1000)
        total = plan.decoder_bytes + plan.vision_bytes
        body.append([name, gib(plan.decoder_bytes), gib(plan.vision_bytes), gib(total)])
    return rows(["model", "decoder, GiB", "vision tower, GiB", "together, GiB"], body)


def plans() -> str:
    """What `tieredkv plan` says of some lengths under some caps."""
    body = []
    for name in VIDEO_SHAPES:
        config = video_config(name)
        shape = model_shape(config, torch.bfloat16)
        for tokens in (32_768, 131_072, 262_144):
            prompt = forecast.HEAD_TOKENS + tokens + QUESTION
            layout = sizes.lay_out(TierConfig(), prompt, QUESTION, ANSWER)
            least = admission.smallest_cap_bytes(shape, TierConfig(), layout, QUESTION)
            host = sizes.host_bytes(shape, TierConfig(), prompt)
            for cap in (1.0, 2.0, 4.0):
                row = [name, f"{tokens:,}", gib(host), as_gib(least), f"{cap:g}"]
                if cap * GIB < least:
                    body.append([*row, "refused", ""])
                    continue
                plan = forecast.plan(config, tokens, gpu_kv_gb=cap, question_tokens=QUESTION, max_new_tokens=ANSWER)
                share = min(1.0, plan.dynamic_tokens / (prompt + ANSWER))
                body.append([*row, f"{plan.dynamic_tokens:,} ({share:.0%})", gib(plan.prefill_copy_bytes)])
    header = ["model", "visual tokens", "host, GiB", "least cap, GiB", "cap, GiB", "tokens a step attends to"]
    return rows([*header, "prefill copies, GiB"], body)


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


TABLES = {"per-token": per_token, "per-hour": per_hour, "weights": weights, "plans": plans, "policies": policies}
PAGES = ("memory-sizes.md", "policies.md")


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
