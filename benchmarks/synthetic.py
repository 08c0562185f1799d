"""Models of real shapes with random weights, and caches filled without a prefill: for benchmarks of decoding.

Keys, values and weights are random. Sizes, copies and arithmetic are those of a real model; the choice of chunks is
not, so ranks follow a script (`drift.py`), and hit rates are reported with the times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from drift import Drift

from tieredkv import TierConfig, TieredCache, use_attention
from tieredkv.cache.layer import TieredLayer
from tieredkv.cache.looks import Looks
from tieredkv.cache.prefill import TextRows
from tieredkv.cache.question import Question
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.ops.base import Ops
from tieredkv.policy.correction import rank_of
from tieredkv.session.step_graph import StepGraph

SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "demo": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 73,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
"""Decoders of Qwen2.5-VL-7B and 3B, of the bundled model, and a small one, to check that a benchmark runs."""
WARM = 3
"""Steps before any is timed: they fetch the first chunks, compile, and on a card capture the graph."""


def make_model(shape: str, device: str, dtype: torch.dtype, **changes: int) -> Any:
    """A Qwen2 decoder of the given shape, with sdpa and random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **{**SHAPES[shape], **changes}, max_position_embeddings=2**20, rope_theta=1e6, tie_word_embeddings=False
    )
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen2ForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def keys_and_values(model: Any, tokens: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer, each `(K, N, D)`, on the model's device; the same at every call."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    generator = torch.Generator(device=model.device).manual_seed(1000 * layer + tokens)
    shape = (config.num_key_value_heads, tokens, head_dim)
    return tuple(  # type: ignore[return-value]
        torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype) for _ in range(2)
    )


def fill(cache: TieredCache, model: Any, tokens: int) -> None:
    """Put `tokens` tokens into a cache as a prefill would.

    The text rows are invented so that no head is static: the most expensive case, and the usual one of trained models.
    """
    for index, layer in enumerate(cache.tiered_layers):
        keys, values = keys_and_values(model, tokens, index)
        layer.lazy_initialization(keys[None, :, :1], values[None, :, :1])
        assert layer.digests is not None
        layer.digests.observe(torch.eye(keys.shape[-1]).expand(len(keys), -1, -1), 0)
        even = torch.rand(2, len(keys), tokens)
        rows = TextRows(torch.zeros(len(keys)), even / even.sum(-1, keepdim=True), count=32)
        layer.append(keys.cpu(), values.cpu(), rows)
        correct(layer, model)
    cache.expect(replace(cache.question, rows=32))
    cache.settle()


def correct(layer: TieredLayer, model: Any) -> None:
    """Give a filled layer a correction of predicted queries, of the shipped size. Its numbers are random and small."""
    width = model.config.hidden_size  # of the stream, and in these shapes of all heads' queries together
    rank = rank_of(width)
    shapes = {"ahead.down": (width, rank), "ahead.offset": (rank,), "ahead.up": (rank, width)}
    numbers = {name: 1e-3 * torch.randn(shape, dtype=model.dtype, device="cpu") for name, shape in shapes.items()}
    layer.correcting.restore(numbers)


@contextmanager
def filled(model: Any, tokens: int, drift: Drift, room: int, tiers: TierConfig) -> Iterator[TieredCache]:
    """A cache of `tokens` tokens with the script's operations, not sealed, with memory for `room` steps. Inside the
    block the model uses tieredkv's attention."""
    options = {"max_new_tokens": room, "prompt_tokens": tokens + 256, "ops": drift.ops}
    with use_attention(model), TieredCache(model.config, tiers, **options, copies=drift.copies(model.device)) as cache:
        fill(cache, model, tokens)
        yield cache


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tiers_for(model: Any, tokens: int, budget: float, **more: Any) -> TierConfig:
    """Settings under a cap of the whole cache's size."""
    full_gib = tokens * model_shape(model.config, model.dtype).token_bytes / GIB
    return TierConfig(gpu_kv_gb=max(0.5, full_gib), budget_ratio=budget, **more)


@contextmanager
def sealed(
    cache: TieredCache,
    model: Any,
    drift: Drift,
    tiers: TierConfig,
    hit_rate: float | None,
    room: int,
    looks: Looks | None = None,
    eager: bool = False,
    told: dict[str, Any] | None = None,
    **script: float | None,
) -> Iterator[StepGraph]:
    """The steps, at most `room`, of a filled cache that is sealed with other settings. After the block it is as filled.

    looks: records evidence. told: is told how long the seal took. hit_rate, script: as of `Drift.begin`.
    """
    tokens = cache.get_seq_length()
    cache.set_tiers(tiers)
    cache.expect(Question(max_new_tokens=room, rows=32, looks=looks))
    wait_for(model.device)
    begin = time.perf_counter()
    cache.seal()
    wait_for(model.device)
    if told is not None:
        told["seal_s"] = time.perf_counter() - begin
    drift.begin(cache, hit_rate, **script)

    def forward(token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return model(token, **cache_argument(cache), position_ids=place).logits[:, -1]

    try:
        steps = StepGraph(forward, cache, model.device, axes=1, position=tokens)
        if eager:
            steps.path = "eager: asked for"
        yield steps
    finally:
        wait_for(model.device)
        cache.truncate(tokens)


@contextmanager
def scripted(
    model: Any, tokens: int, ops: Ops, hit_rate: float, budget: float, room: int, bits: int | None = None
) -> Iterator[tuple[TieredCache, StepGraph]]:
    """A sealed cache of `tokens` tokens whose ranks follow a script, without copies ahead, and its steps, with memory
    for `room` of them. bits: `host_kv_bits`. `WARM` more are taken first."""
    drift, tiers = Drift(ops), tiers_for(model, tokens, budget, host_kv_bits=bits, ahead=False)
    room += WARM
    with (
        filled(model, tokens, drift, room, tiers) as cache,
        sealed(cache, model, drift, tiers, hit_rate, room) as steps,
    ):
        for _ in range(WARM):
            steps(7)
        yield cache, steps


def milliseconds(step: Callable[[], object], rounds: int, device: str) -> float:
    """Median time of a step, after two steps of warm-up; on a card, by the card's clock."""
    times = []
    for count in range(rounds + 2):
        if device == "cpu":
            begin = time.perf_counter()
            step()
            took = 1000 * (time.perf_counter() - begin)
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            took = start.elapsed_time(end)
        if count >= 2:
            times.append(took)
    return statistics.median(times)
