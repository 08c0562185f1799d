"""Steps of transformers' own caches, that ours are compared with: captured in a graph as ours are, where that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from synthetic import keys_and_values

from tieredkv.environment.versions import cache_argument


def stock_step(model: Any, tokens: int, cache: Any = None) -> Callable[[], torch.Tensor]:
    """A step after `tokens` cached tokens, always the same: logits `(vocabulary,)`. It can be captured.

    The mask is stated to be none, as transformers finds for a single token by itself, but not during a capture: there
    it would make one, and repeat all keys and values for it. A static cache needs its mask.

    cache: a cache of fixed size to fill; None: transformers' default, whose contents are put back before each step.
    """
    from transformers import DynamicCache

    grows = cache is None
    cache = DynamicCache(config=model.config) if grows else cache
    for index in range(model.config.num_hidden_layers):
        keys, values = keys_and_values(model, tokens, index)
        cache.update(keys[None], values[None], index)
    kept = [(layer.keys, layer.values) for layer in cache.layers] if grows else []
    token = torch.full((1, 1), 7, device=model.device)
    place = torch.full((1, 1), tokens, device=model.device)

    mask = {"attention_mask": {"full_attention": None}} if grows else {}

    @torch.no_grad()
    def step() -> torch.Tensor:
        for layer, (keys, values) in zip(cache.layers, kept, strict=bool(kept)):
            layer.keys, layer.values = keys, values
        logits: torch.Tensor = model(token, **cache_argument(cache), **mask, position_ids=place).logits[0, -1]
        return logits

    return step


def graphed(step: Callable[[], object], device: str) -> tuple[Callable[[], object], str]:
    """`step` captured in a graph, and "graph"; on a CPU, or where that fails, the step itself, and why."""
    if device == "cpu":
        return step, "eager"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        torch.cuda.set_stream(before)
        return step, f"eager: {str(error).strip().splitlines()[0]}"
    return graph.replay, "graph"


def growing_step(model: Any, tokens: int, kind: str = "full") -> Callable[[], object]:
    """A step after `tokens` cached tokens, which leaves its own token in the cache: of the default cache ("full"), of
    the "offloaded" one, neither of which can be captured so, or of the "static" one, which torch compiles and captures
    (that takes minutes)."""
    from transformers import DynamicCache, StaticCache

    cache: Any
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=tokens + 64)
    else:
        cache = DynamicCache(config=model.config, offloading=kind == "offloaded")
    for index in range(model.config.num_hidden_layers):
        keys, values = keys_and_values(model, tokens, index)
        cache.update(keys[None], values[None], index)
    forward = torch.compile(model, mode="reduce-overhead") if kind == "static" else model
    token = torch.full((1, 1), 7, device=model.device)
    place = torch.full((1, 1), tokens, device=model.device)

    def step() -> None:
        forward(token, **cache_argument(cache), position_ids=place)
        place.add_(1)

    return step
