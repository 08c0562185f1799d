"""The variants of kernels that steps ask for, without compiling any: python tests/ops/variants.py

Every wrapper runs as usual, on tensors on the CPU, with a driver that reports its target; where Triton would compile,
the variant is recorded and nothing is launched. Prints one JSON object: by case, the variants that each of its
sessions was the first to ask for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from compile_kernels import Driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import LateCopies, cap_share, text_config, tier_options
from transformers import LlamaForCausalLM

import tieredkv
from tieredkv import TieredCache
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import CONTEXT, Question
from tieredkv.environment.versions import cache_argument
from tieredkv.ops.select import triton as kernels

Variant = tuple[str, str]
"""A kernel's name, and the key of its types, constants and options."""


class Unlaunched:
    """Stands for a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        return None


def choosing_none(*given: Any) -> Any:
    """As `Ops.choose` without its results: what was not computed would be used as places in tables."""
    given[-1].zero_()
    return tuple(part.zero_() for part in kernels().choose(*given))


@contextmanager
def recorded() -> Iterator[set[Variant]]:
    """The set of variants asked for in the block, compiled or launched."""
    found: set[Variant] = set()
    compiling = JITFunction._do_compile

    def record(self: Any, key: str, *_: Any, **__: Any) -> Unlaunched:
        found.add((self.__name__, key))
        return Unlaunched()

    JITFunction._do_compile = record
    try:
        yield found
    finally:
        JITFunction._do_compile = compiling


def model_of(kv_heads: int, dtype: torch.dtype) -> Any:
    """Three layers, of two query heads to each KV head."""
    config = text_config("llama")
    config.num_key_value_heads, config.num_attention_heads, config.hidden_size = kv_heads, 2 * kv_heads, 64 * kv_heads
    config.head_dim = 32
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().to(dtype)


def session(model: Any, tokens: int, questions: tuple[int, ...], evidence: bool, share: float, **options: Any) -> None:
    """A context of `tokens` tokens, questions of so many tokens about it, and two steps after each.

    share: of the full cache, that the cap is.
    """
    room = tokens + max(questions) + 16
    chosen = {"budget_ratio": share / 2} if share < 1 else {}
    tiers = {"gpu_kv_gb": cap_share(model, room, share), "chunk_tokens": 8, "text_window": 16, **chosen, **options}
    ids = torch.randint(0, 97, (1, room), generator=torch.Generator().manual_seed(tokens))
    with (
        torch.no_grad(),
        tieredkv.use_attention(model),
        TieredCache(
            model.config,
            **tier_options(**tiers),
            prompt_tokens=room,
            ops=replace(kernels(), choose=choosing_none),
            copies=LateCopies(),
        ) as cache,
    ):
        cache.expect(CONTEXT)
        model(ids[:, :tokens], **cache_argument(cache))
        cache.settle()
        for asked in questions:
            cache.truncate(tokens)
            looks = Looks(8) if evidence else None
            cache.expect(Question(max_new_tokens=8, prompt_tokens=tokens + asked, rows=asked, looks=looks))
            for part in (ids[:, :asked], ids[:, :1], ids[:, 1:2]):
                model(part, **cache_argument(cache))
            cache.finish()


CASES: dict[str, dict[str, Any]] = {
    "ranked": {"share": 0.5, "theta": 0.5},
    "all dynamic": {"share": 0.5, "theta": 2.0},
    "everything fits": {"share": 4.0},
    "16 bits": {"share": 0.8, "host_kv_bits": 16, "pack_pages": False},
    "8 bits": {"share": 0.5, "host_kv_bits": 8},
    "4 bits": {"share": 0.5, "host_kv_bits": 4},
    "adaptive": {"share": 0.5, "adaptive": True},
    "reuse": {"share": 0.5, "reuse_above": 0.9, "prefetch": True},
    "streaming": {"share": 0.5, "policy": "streaming"},
    "arkvale": {"share": 0.5, "policy": "arkvale"},
}
"""By name: what a session's settings are."""


def main() -> None:
    triton.runtime.driver.set_active(Driver(89))
    model = model_of(4, torch.bfloat16)
    report = {}
    for name, options in CASES.items():
        for evidence in (False, True):
            known, grown = set(), []
            for tokens, questions in ((400, (16, 30)), (512, (17, 40)), (700, (16,)), (1060, (33,))):
                with recorded() as found:
                    session(model, tokens, questions, evidence, **options)
                grown.append(sorted({kernel for kernel, _ in found - known}))
                counts = {}
                for kernel, _ in found - known:
                    counts[kernel] = counts.get(kernel, 0) + 1
                grown[-1] = counts
                known |= found
            report[f"{name}{', evidence' if evidence else ''}"] = grown
            print(name, evidence, len(known), [sum(c.values()) for c in grown], grown[1:], flush=True)


if __name__ == "__main__":
    main()
