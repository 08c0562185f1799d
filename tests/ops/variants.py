"""The variants of kernels that steps ask for, without compiling any: python tests/ops/variants.py

Every wrapper runs as usual, on tensors on the CPU, with a driver that reports its target; where Triton would compile,
the variant is recorded and nothing is launched. Prints a line of JSON for each case.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
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
from tieredkv.ops.base import Expected, Listing
from tieredkv.ops.select import triton as kernels
from tieredkv.policy.digests import DIGESTS

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
    for set_by_it in given[4:]:
        if set_by_it is not None:
            set_by_it.zero_()
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


def session(
    model: Any, tokens: int, questions: tuple[int, ...], evidence: bool, share: float, **options: Any
) -> tuple[set[Variant], set[Variant]]:
    """The variants compiled ahead of the first question, and those that questions and answers ask for: of a context of
    `tokens` tokens, questions of so many tokens about it, and two steps after each.

    share: of the full cache, that the cap is.
    """
    room = tokens + max(questions) + 16
    chosen = {"budget_ratio": share / 2} if share < 1 else {}
    tiers = {"gpu_kv_gb": cap_share(model, room, share), "chunk_tokens": 8, "text_window": 16, **chosen, **options}
    ids = torch.randint(0, 97, (1, room), generator=torch.Generator().manual_seed(tokens))
    ops = replace(kernels(), choose=choosing_none)
    with (
        torch.no_grad(),
        tieredkv.use_attention(model),
        TieredCache(model.config, **tier_options(**tiers), prompt_tokens=room, ops=ops, copies=LateCopies()) as cache,
    ):
        cache.expect(CONTEXT)
        model(ids[:, :tokens], **cache_argument(cache))
        cache.settle()
        with recorded() as ahead:
            tier = cache.device_tier
            for prepare in ops.preparations(tier.expected(model.dtype)):
                prepare()
        with recorded() as asked:
            for length in questions:
                cache.truncate(tokens)
                looks = Looks(8) if evidence else None
                cache.expect(Question(max_new_tokens=8, prompt_tokens=tokens + length, rows=length, looks=looks))
                for part in (ids[:, :length], ids[:, :1], ids[:, 1:2]):
                    model(part, **cache_argument(cache))
                cache.finish()
    return ahead, asked


CASES: dict[str, dict[str, Any]] = {
    "ranked": {"share": 0.5, "theta": 0.5},
    "all dynamic": {"share": 0.5, "theta": 2.0},
    "everything fits": {"share": 4.0},
    "16 bits": {"share": 0.8, "host_kv_bits": 16, "pack_pages": False},
    "8 bits": {"share": 0.5, "host_kv_bits": 8},
    "4 bits": {"share": 0.5, "host_kv_bits": 4},
    "adaptive": {"share": 0.5, "adaptive": True},
    "reuse": {"share": 0.5, "reuse_above": 0.9, "prefetch": True},
    "ahead": {"share": 0.45, "theta": 0.5, "ahead": True},
    "streaming": {"share": 0.5, "policy": "streaming"},
    "arkvale": {"share": 0.5, "policy": "arkvale"},
}
"""By name: a session's settings."""
SESSIONS = ((400, (16, 30)), (512, (17,)))
"""Contexts, and the questions about each."""
LAYERS = ((4, 40_001, 9_000, 800), (1, 16_384, 4_096, 16), (3, 1, 1, 1), (2, 17, 16, 3))
"""Dynamic heads, chunks, slots and most misses of a layer."""


def of_lengths() -> tuple[set[Variant], set[Variant]]:
    """The variants compiled ahead for a long prompt, and those that layers with any number of heads, chunks, slots and
    misses ask for."""
    expected = Expected(
        28, 4, torch.bfloat16, (), DIGESTS["sketch"](128, 8, 4), "mean", 2.0, chunks=40_001
    )  # fmt: skip
    with recorded() as ahead:
        for prepare in kernels().preparations(expected):
            prepare()
    meta, int32 = torch.device("meta"), torch.int32
    with recorded() as asked, meta:
        for heads, chunks, slots, most in (
            (4, 40_001, 9_000, 800),
            (1, 16_384, 4_096, 16),
            (3, 1, 1, 1),
            (2, 17, 16, 3),
        ):
            ranks, slot_of = torch.empty(heads, chunks), torch.empty(heads, chunks + 1, dtype=int32)
            chosen, counts = torch.empty(heads, chunks, dtype=torch.bool), torch.empty(heads, dtype=torch.int64)
            order = torch.empty(heads, chunks, dtype=int32)
            missed, misses = kernels().choose(ranks, counts, slot_of, most, chosen, order)
            used = [torch.empty(heads, slots, dtype=int32) for _ in range(3)]
            listing = Listing(torch.empty(4, slots + 5, dtype=int32), counts, 5, order)
            step = torch.empty(heads, dtype=int32)
            kernels().place(chosen, chosen, missed, misses, *used, step, counts, listing)
            kernels().log_mass_without(torch.empty(heads, 7, chunks), chosen, torch.empty(heads, 7))
    return ahead, asked


def main() -> None:
    """Print, case by case, how many variants there are of each kernel, how many of them only later sessions ask for,
    and which were not compiled ahead."""
    triton.runtime.driver.set_active(Driver(89))
    if "lengths" in sys.argv[1:]:
        ahead, asked = of_lengths()
        print(json.dumps({"case": "lengths", "asked": len(asked), "missing": sorted(map(str, asked - ahead))}))
        return
    model = model_of(4, torch.bfloat16)
    for name in sys.argv[1:] or CASES:
        for evidence in (False, True):
            first, *later = [session(model, *sizes, evidence, **CASES[name]) for sizes in SESSIONS]
            asked = set().union(*(asked for _, asked in later)) - first[1]
            missing = set().union(*(asked - ahead for ahead, asked in (first, *later)))
            report = {
                "case": name,
                "evidence": evidence,
                "asked": dict(Counter(kernel for kernel, _ in first[1])),
                "ahead": dict(Counter(kernel for kernel, _ in first[0])),
                "later": sorted(kernel for kernel, _ in asked),
                "missing": sorted(kernel for kernel, _ in missing),
            }
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
