"""Exact prefill: new tokens attend to each other and to the whole past, which is streamed from the host tier.

Shapes: `H` query heads, `K` KV heads, `G = H // K`, `n` new tokens, `T` text rows, `N` all tokens so far, `D` head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tieredkv.attention import exact
from tieredkv.cache.looks import Looks
from tieredkv.config import TierConfig
from tieredkv.memory.copies import BackgroundCopies, Transfer
from tieredkv.memory.host import HostLayer
from tieredkv.memory.ledger import DeviceLedger
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning.admission import refusal
from tieredkv.planning.prefill_plan import Call, buffer_bytes, plan_staging
from tieredkv.planning.sizes import lay_out
from tieredkv.policy import classify


@dataclass(frozen=True, slots=True)
class TextRows:
    """What the last text rows of a prompt say about one layer's heads."""

    scores: torch.Tensor
    """Text-centric score of each KV head, `(K,)`."""
    halves: torch.Tensor
    """Attention that every other row pays each token, averaged over those rows and the group: `(2, K, N)` float32, on
    the host. The second half is of the last row and every other before it."""
    count: int
    """Rows that were looked at."""

    @property
    def saliency(self) -> torch.Tensor:
        """Attention the rows pay each token, averaged over rows and group: `(K, N)`."""
        return self.halves.mean(0)


@dataclass(slots=True)
class Resident:
    """The first tokens of one layer, kept on the device while the prompt is prefilled: keys and values `(K, R, D)`."""

    keys: torch.Tensor
    values: torch.Tensor
    length: int = 0

    @property
    def room(self) -> int:
        """R."""
        return self.keys.shape[1]

    def append(self, keys: torch.Tensor, values: torch.Tensor, first: int) -> None:
        """Keep what fits of the tokens `(K, n, D)` that follow the layer's first `first` ones."""
        take = min(self.room - first, keys.shape[1])
        if self.length == first and take > 0:
            self.keys[:, first : first + take] = keys[:, :take]
            self.values[:, first : first + take] = values[:, :take]
            self.length += take


class Past:
    """The cached tokens of one layer: the first of them on the device, the rest staged from the host tier.

    Staging is double-buffered: while one block is attended to, the next is copied in the background.
    """

    def __init__(
        self,
        host: HostLayer,
        resident: Resident | None,
        block_tokens: int,
        buffers: list[torch.Tensor],
        transfer: Transfer,
        copies: BackgroundCopies,
    ) -> None:
        """buffers: three flat tensors, each with room for the keys and values of `block_tokens` tokens.

        Two are staged to, in turns; in the third keys and values are taken apart.
        """
        self.host, self.tokens, self.block_tokens = host, host.length, block_tokens
        self.resident, self.transfer, self.copies = resident, transfer, copies
        self._buffers = buffers
        first = 0 if resident is None else resident.length
        self._ranges = list(host.blocks(first, self.tokens, block_tokens)) if first < self.tokens else []
        self._ahead = False

    def _staged(self, index: int) -> torch.Tensor:
        """The buffer of block `index`, shaped for its chunks: `(K, n, 2, C, D)`."""
        start, stop = self._ranges[index]
        h = self.host
        shape = (h.num_heads, stop - start, 2, h.chunk_tokens, h.head_dim)
        return self._buffers[index % 2][: math.prod(shape)].view(shape)

    def _stage(self, index: int, with_values: bool) -> None:
        start, stop = self._ranges[index]
        staged, chunks = self._staged(index), self.host.chunks(start, stop)
        self.copies.submit("past", lambda: self.transfer.stage(chunks, staged, with_values))

    def _apart(self, staged: torch.Tensor, with_values: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a staged block, `(K, n * C, D)`; without `with_values` the values are undefined."""
        k, n, _, c, d = staged.shape
        both = self._buffers[2][: staged.numel()].view(2, k, n, c, d)
        parts = 2 if with_values else 1
        both[:parts].copy_(staged[:, :, :parts].movedim(2, 0))
        keys, values = both.view(2, k, n * c, d)
        return keys, values

    def run_ahead(self) -> None:
        """Start on the first block that `blocks(with_values=True)` will need."""
        if self._ranges:
            self._stage(0, with_values=True)
            self._ahead = True

    def blocks(self, with_values: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Consecutive blocks of the past on the device, keys and values `(K, m, D)`; each valid until the next."""
        if self.resident is not None:
            held = min(self.resident.length, self.tokens)
            for start in range(0, held, self.block_tokens):
                stop = min(start + self.block_tokens, held)
                yield self.resident.keys[:, start:stop], self.resident.values[:, start:stop]
        if self._ranges and not self._ahead:
            self._stage(0, with_values)
        self._ahead = False
        for index, (start, stop) in enumerate(self._ranges):
            self.transfer.streamed_bytes += self.copies.wait("past")
            if index + 1 < len(self._ranges):  # into the buffer of the block before, which nobody reads any more
                self._stage(index + 1, with_values)
            keys, values = self._apart(self._staged(index), with_values)
            filled = min(self.tokens, stop * self.host.chunk_tokens) - start * self.host.chunk_tokens
            yield keys[:, :filled], values[:, :filled]


@contextmanager
def staged_past(
    host: HostLayer,
    resident: Resident | None,
    new_tokens: int,
    rows: int,
    shape: KVShape,
    tiers: TierConfig,
    ledger: DeviceLedger,
    transfer: Transfer,
    copies: BackgroundCopies,
    device: torch.device,
    to_generate: int,
) -> Iterator[Past]:
    """One layer's past, with device buffers for staging it and for scoring `rows` text rows, released after the block.

    Raises `BudgetError` when not even one chunk fits under the cap; it names a cap that will also do for
    `to_generate` tokens afterwards.
    """
    total = host.length + new_tokens
    room, held = (0, 0) if resident is None else (resident.room, resident.length)
    staging = plan_staging(shape, tiers, Call(host.length, total, rows), held, room)
    if staging is None:
        raise refusal(shape, tiers, lay_out(tiers, total, rows, to_generate), rows)
    flat = buffer_bytes(shape, staging.buffer_tokens) // host.dtype.itemsize
    try:
        made = [ledger.empty("staging", (flat,), host.dtype, device) for _ in range(staging.buffers)]
        ledger.reserve("scores", staging.scoring_bytes)
        buffers = [made[0], made[-2], made[-1]] if made else []
        yield Past(host, resident, staging.block_tokens, buffers, transfer, copies)
    except BaseException:
        copies.drain()  # into buffers that are given up
        raise
    finally:
        ledger.release("staging")
        ledger.release("scores")


def attend_exactly(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, past: Past
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of new tokens over themselves and all of the past: output `(H, n, D)` and lse `(H, n)`."""
    out, lse = exact.attend(query, keys, values, scaling, causal=True)
    if past.tokens == 0:
        return out, lse
    merged = out.float()
    for block_keys, block_values in past.blocks(with_values=True):
        part, part_lse = exact.attend(query, block_keys, block_values, scaling, causal=False)
        merged, lse = exact.merge(merged, lse, part, part_lse)
    return merged.to(query.dtype), lse


def score_text_rows(
    query: torch.Tensor,
    lse: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    past: Past,
    tiers: TierConfig,
    looks: Looks | None = None,
) -> TextRows:
    """Scores of the last `T` new tokens over past and new keys, in a second pass that reads keys only.

    query `(H, T, D)` and lse `(H, T)`: the last rows of the call whose new keys are `(K, n, D)`. looks: takes the
    rows' attention to the past.
    """
    t, new = query.shape[1], keys.shape[1]
    total = past.tokens + new
    k = classify.top_k_count(tiers.policy.top_k_ratio, total)
    window = min(t, tiers.policy.saliency_window)
    halves = torch.empty((2, keys.shape[0], total), dtype=torch.float32, device="cpu")
    best: torch.Tensor | None = None
    done = 0

    def take(weights: torch.Tensor) -> None:
        nonlocal best, done
        best = classify.merge_top_k(best, weights, k)
        last = weights[:, :, -window:]
        for half in (0, 1):  # a single row is both
            rows = last[:, :, (half + window) % 2 :: 2] if window > 1 else last
            halves[half, :, done : done + weights.shape[-1]] = rows.mean((1, 2))
        done += weights.shape[-1]

    for block_keys, _ in past.blocks(with_values=False):
        weights = exact.row_weights(query, block_keys, lse, scaling)
        if looks is not None:
            looks.add_rows(done, weights, past.tokens)
        take(weights)
    sees = torch.arange(new - t + 1, new + 1, device=keys.device)
    for start in range(0, new, past.block_tokens):
        block = keys[:, start : start + past.block_tokens]
        take(exact.row_weights(query, block, lse, scaling, first_hidden=sees - start))
    assert best is not None
    return TextRows(
        scores=classify.text_centric_scores(best, tiers.policy.score_group).cpu(),
        halves=halves,
        count=window,
    )
