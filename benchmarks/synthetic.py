"""Models of real shapes with random weights, and caches filled without a prefill: for benchmarks of decoding.

Keys, values and weights are random. Sizes, copies and arithmetic are those of a real model; the choice of chunks is
not, so hit rates are reported with the times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from tieredkv import Policy, TierConfig, TieredCache, use_attention
from tieredkv.cache.prefill import TextRows
from tieredkv.environment.ambient import settled
from tieredkv.environment.versions import cache_argument
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.ops.base import Ops
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
    cache.expect(replace(cache.question, rows=32))
    cache.settle()


class Drift:
    """Operations whose ranks follow a script, so that a given share of the chosen chunks is in the pool already.

    Each head advances through its chunks in a random order, at a rate such that the given share of the chosen chunks
    was chosen at the step before. Everything else is done as usual, including the real ranking, whose result is then
    not used.
    """

    def __init__(self, ops: Ops) -> None:
        self._real = ops
        self._scripts: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.ops = replace(ops, chunk_ranks=self._ranks)

    @settled  # steps write to the script outside inference mode
    def begin(self, cache: TieredCache, hit_rate: float | None) -> None:
        """Write the script for a cache that was sealed with these operations; None: ranks are the real ones."""
        self._scripts.clear()
        for layer in cache.tiered_layers if hit_rate is not None else ():
            assert layer.sealed is not None
            retrieval = layer.sealed.retrieval
            if retrieval is not None:
                chosen = retrieval.residency.chosen
                order = torch.rand(chosen.shape, device=chosen.device).argsort(dim=1)
                shift = ((1 - hit_rate) * retrieval.selected).round().long().unsqueeze(1)
                self._scripts[chosen.data_ptr()] = order, shift, torch.zeros_like(shift)

    def _ranks(
        self, logits: torch.Tensor, chosen: torch.Tensor, group: str, stay: float, parts: torch.Tensor | None = None
    ) -> torch.Tensor:
        ranks = self._real.chunk_ranks(logits, chosen, group, stay, parts)
        if not self._scripts:
            return ranks
        order, shift, place = self._scripts[chosen.data_ptr()]
        place += shift
        return ranks.copy_(-torch.remainder(order - place, chosen.shape[1]))


@contextmanager
def scripted(
    model: Any,
    tokens: int,
    ops: Ops,
    hit_rate: float,
    budget: float,
    room: int,
    policy: str | Policy = "hybridkv",
    bits: int | None = None,
) -> Iterator[tuple[TieredCache, StepGraph]]:
    """A sealed cache of `tokens` tokens whose ranks follow a script, and its steps, with memory for `room` of them.

    bits: `host_kv_bits`. Three more are done first: they fetch the first chunks, compile, and on a card capture the
    graph.
    """
    full_gib = tokens * model_shape(model.config, model.dtype).token_bytes / GIB
    tiers = TierConfig(gpu_kv_gb=max(0.5, full_gib), budget_ratio=budget, policy=policy, host_kv_bits=bits)
    drift = Drift(ops)
    with (
        use_attention(model),
        TieredCache(model.config, tiers, max_new_tokens=room + 3, prompt_tokens=tokens + 256, ops=drift.ops) as cache,
    ):
        fill(cache, model, tokens)
        cache.seal()
        drift.begin(cache, hit_rate)

        def forward(token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            return model(token, **cache_argument(cache), position_ids=place).logits[:, -1]

        steps = StepGraph(forward, cache, model.device, axes=1, position=tokens)
        for _ in range(3):
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
