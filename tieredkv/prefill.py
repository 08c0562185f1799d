"""Exact prefill: new tokens attend to each other and to the whole past, which is streamed from the host tier.

Shapes: `H` query heads, `K` KV heads, `G = H // K`, `n` new tokens, `T` text rows, `N` all tokens so far, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tieredkv import sizes
from tieredkv.attention import reference
from tieredkv.config import TierConfig
from tieredkv.memory.device import DeviceLedger
from tieredkv.memory.host import HostLayer
from tieredkv.memory.transfer import Transfer
from tieredkv.policy import classify, prune


@dataclass(frozen=True, slots=True)
class TextRows:
    """What the last text rows of a prompt say about one layer's heads."""

    scores: torch.Tensor
    """S of each KV head, `(K,)`."""
    saliency: torch.Tensor
    """Attention the rows pay each token, averaged over rows, group and neighbours: `(K, N)`, on the host."""


@dataclass(frozen=True, slots=True)
class Past:
    """The cached tokens of one layer, to be read through device buffers of `block_tokens` tokens."""

    host: HostLayer
    tokens: int
    block_tokens: int
    keys: torch.Tensor
    values: torch.Tensor
    transfer: Transfer

    def blocks(self, with_values: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Consecutive blocks of the past on the device, keys and values `(K, m, D)`; each valid until the next."""
        h = self.host
        for start, stop in h.blocks(self.tokens, self.block_tokens):
            padded = (stop - start) * h.chunk_tokens
            size = h.num_heads * padded * h.head_dim
            keys = self.keys[:size].view(h.num_heads, padded, h.head_dim)
            values = self.values[:size].view(h.num_heads, padded, h.head_dim)
            self.transfer.stage(h.chunks(start, stop), keys, values if with_values else None)
            filled = min(self.tokens, stop * h.chunk_tokens) - start * h.chunk_tokens
            yield keys[:, :filled], values[:, :filled]


@contextmanager
def staged_past(
    host: HostLayer,
    new_tokens: int,
    rows: int,
    shape: sizes.KVShape,
    tiers: TierConfig,
    ledger: DeviceLedger,
    transfer: Transfer,
    device: torch.device,
    to_generate: int,
) -> Iterator[Past]:
    """Device buffers for one layer's past and for scoring `rows` text rows, counted and released after the block.

    Raises `BudgetError` when not even one chunk fits under the cap; it names a cap that will also do for
    `to_generate` tokens afterwards.
    """
    total = host.length + new_tokens
    block = sizes.staging_tokens(shape, tiers, total, rows)
    if block == 0:
        raise sizes.refusal(shape, tiers, sizes.lay_out(tiers, total, rows, to_generate), rows)
    begun = sizes.ceil_div(host.length, tiers.chunk_tokens) * tiers.chunk_tokens
    block = min(block, max(begun, sizes.ceil_div(new_tokens, tiers.chunk_tokens) * tiers.chunk_tokens))
    flat = host.num_heads * min(block, begun) * host.head_dim
    try:
        keys = ledger.empty("staging", (flat,), host.dtype, device)
        values = ledger.empty("staging", (flat,), host.dtype, device)
        ledger.reserve("scores", sizes.scoring_bytes(shape, tiers, total, rows, block))
        yield Past(host, host.length, block, keys, values, transfer)
    finally:
        ledger.release("staging")
        ledger.release("scores")


def attend_exactly(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, past: Past
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of new tokens over themselves and all of the past: output `(H, n, D)` and lse `(H, n)`."""
    out, lse = reference.attend(query, keys, values, scaling, causal=True)
    if past.tokens == 0:
        return out, lse
    merged = out.float()
    for block_keys, block_values in past.blocks(with_values=True):
        part, part_lse = reference.attend(query, block_keys, block_values, scaling, causal=False)
        merged, lse = reference.merge(merged, lse, part, part_lse)
    return merged.to(query.dtype), lse


def score_text_rows(
    query: torch.Tensor, lse: torch.Tensor, keys: torch.Tensor, scaling: float, past: Past, tiers: TierConfig
) -> TextRows:
    """Scores of the last `T` new tokens over past and new keys, in a second pass that reads keys only.

    query `(H, T, D)` and lse `(H, T)`: the last rows of the call whose new keys are `(K, n, D)`.
    """
    t, new = query.shape[1], keys.shape[1]
    total = past.tokens + new
    k = classify.top_k_count(tiers.top_k_ratio, total)
    window = min(t, tiers.saliency_window)
    saliency = torch.empty((keys.shape[0], total), dtype=torch.float32)
    best: torch.Tensor | None = None
    done = 0

    def take(weights: torch.Tensor) -> None:
        nonlocal best, done
        best = classify.merge_top_k(best, weights, k)
        saliency[:, done : done + weights.shape[-1]] = weights[:, :, -window:].mean((1, 2))
        done += weights.shape[-1]

    for block_keys, _ in past.blocks(with_values=False):
        take(reference.row_weights(query, block_keys, lse, scaling))
    sees = torch.arange(new - t + 1, new + 1, device=keys.device)
    for start in range(0, new, past.block_tokens):
        block = keys[:, start : start + past.block_tokens]
        take(reference.row_weights(query, block, lse, scaling, first_hidden=sees - start))
    assert best is not None
    return TextRows(
        scores=classify.text_centric_scores(best).cpu(),
        saliency=prune.pool_saliency(saliency, tiers.saliency_pool),
    )
