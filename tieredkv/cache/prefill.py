"""Exact prefill: new tokens attend to each other and to the whole past, which is streamed from the host tier.

Shapes: `H` query heads, `K` KV heads, `G = H // K`, `n` new tokens, `T` text rows, `N` all tokens so far, `D` head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tieredkv.attention import exact
from tieredkv.cache.device_tier import DeviceTier
from tieredkv.cache.looks import Looks
from tieredkv.cache.question import Question
from tieredkv.cache.resident import Resident
from tieredkv.config import TierConfig
from tieredkv.memory.host import HostLayer
from tieredkv.planning.admission import refusal
from tieredkv.planning.prefill_plan import plan_staging
from tieredkv.planning.sizes import lay_out
from tieredkv.policy import classify


@dataclass(frozen=True, slots=True)
class TextRows:
    """What the last rows of a prompt, its question, say about one layer's heads."""

    scores: torch.Tensor | None
    """Text-centric score of each KV head, `(K,)`; None: nothing depends on it (`Policy.scores_mass`)."""
    halves: torch.Tensor
    """Attention that every other row pays each token, averaged over those rows and the group: `(2, K, N)` float32, on
    the host. The last row is in the second half."""
    count: int
    """Rows that `halves` averages."""

    @property
    def saliency(self) -> torch.Tensor:
        """Attention the rows pay each token, averaged over rows and group: `(K, N)`."""
        return self.halves.mean(0)

    def with_reader(self, rows: TextRows, attended: int, group: str) -> TextRows:
        """Also over the heads of a layer that reads the same keys, as if they were in the same groups.

        attended: layers that the result covers, of the same number of heads. group: how scores of a group are joined.
        """
        scores = None
        if self.scores is not None and rows.scores is not None:
            scores = torch.maximum(self.scores, rows.scores)
            if group != "max":
                scores = torch.lerp(self.scores, rows.scores, 1 / attended)
        return TextRows(scores, torch.lerp(self.halves, rows.halves, 1 / attended), self.count)


class Past:
    """The cached tokens of one layer: the first of them on the device, the rest staged from the host tier.

    Staging is double-buffered: while one block is attended to, the next is copied in the background.
    """

    def __init__(
        self,
        device_tier: DeviceTier,
        host: HostLayer,
        resident: Resident | None,
        tokens: int,
        rows: int,
        block_tokens: int,
        staging: list[torch.Tensor],
        decoded: torch.Tensor,
    ) -> None:
        """tokens: how many of the host's are the past. rows: how many of the new tokens are scored. staging: none if
        nothing is staged, or one or two flat buffers of bytes with room for the records of `block_tokens` tokens, to
        which blocks are staged in turn. decoded: flat, with room for their keys and values in the model's dtype.
        """
        self.host, self.tokens, self.block_tokens = host, tokens, block_tokens
        self.resident, self.rows = resident, rows
        self._device_tier, self._copies = device_tier, device_tier.copies
        self._staging, self._decoded = staging, decoded
        self._fit = host.fit_on(decoded.device)
        first = 0 if resident is None else resident.length
        self._ranges = list(host.blocks(first, self.tokens, block_tokens)) if first < self.tokens else []
        self._first_staged = False

    def _staged(self, index: int) -> torch.Tensor:
        """The records of block `index` on the device, `(K, n, B)`."""
        start, stop = self._ranges[index]
        shape = self.host.num_heads, stop - start, self.host.codec.chunk_bytes
        return self._staging[index % len(self._staging)][: math.prod(shape)].view(shape)

    def _stage(self, index: int, with_values: bool) -> None:
        (start, stop), staged = self._ranges[index], self._staged(index)
        self._copies.submit("past", lambda: self.host.stage(start, stop, staged, with_values))

    def _decode(self, records: torch.Tensor, with_values: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(K, n * C, D)` of records `(K, n, B)`; without `with_values` the values are undefined."""
        shape = 2, *records.shape[:2], self.host.chunk_tokens, self.host.head_dim
        both = self._decoded[: math.prod(shape)].view(shape)
        self.host.codec.decode_to(both[0], both[1] if with_values else None, records, self._fit)
        keys, values = both.flatten(2, 3)
        return keys, values

    def stage_first(self) -> None:
        """Start staging the first block of the coming `blocks(with_values=True)`."""
        if self._ranges:
            self._stage(0, with_values=True)
            self._first_staged = True

    def joined(self, new: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values `(K, tokens + new, D)` of the past and of new tokens, if the device has all of them, and then
        nothing is staged. `Resident.put` must have been called with the new ones."""
        resident, total = self.resident, self.tokens + new
        if resident is None or resident.length < self.tokens or resident.room < total:
            return None
        return resident.keys[:, :total], resident.values[:, :total]

    def blocks(self, with_values: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Consecutive blocks of the past on the device, keys and values `(K, m, D)`; each valid until the next.

        with_values: residents are one block, however many.
        """
        if self.resident is not None and (kept := min(self.resident.length, self.tokens)):
            keys, values = self.resident.keys[:, :kept], self.resident.values[:, :kept]
            step = kept if with_values else self.block_tokens
            yield from zip(keys.split(step, dim=1), values.split(step, dim=1), strict=True)
        if self._ranges and not self._first_staged:
            self._stage(0, with_values)
        self._first_staged = False
        for index, (start, stop) in enumerate(self._ranges):
            self._device_tier.streamed_bytes += self._copies.wait("past")
            if index + 1 < len(self._ranges):  # into the previous block's buffer, which is no longer read
                self._stage(index + 1, with_values)
            keys, values = self._decode(self._staged(index), with_values)
            filled = min(self.tokens, stop * self.host.chunk_tokens) - start * self.host.chunk_tokens
            yield keys[:, :filled], values[:, :filled]


@contextmanager
def staged_past(
    device_tier: DeviceTier,
    layer: int,
    device: torch.device,
    host: HostLayer,
    tokens: int,
    new_tokens: int,
    question: Question,
) -> Iterator[Past]:
    """The past of a layer, by its index and device: its first `tokens` tokens, before `new_tokens` more. Buffers for
    staging it and for scoring rows are released after the block.

    Raises `BudgetError` when not even one chunk fits under the cap. The cap it names also suffices for the question's
    generated tokens.
    """
    tiers, shape, ledger = device_tier.tiers, device_tier.shape, device_tier.ledger
    call = question.call(tokens, new_tokens, tiers.policy.text_window)
    device_tier.make_room_for_scores(call)
    resident = device_tier.residents.get(layer)
    room, kept = (0, 0) if resident is None else (resident.room, min(resident.length, tokens))
    staging = plan_staging(shape, tiers, call, kept, room, device_tier.host_bits)
    if staging is None:
        layout = lay_out(tiers, call.stop, call.rows, question.max_new_tokens)
        raise refusal(shape, tiers, layout, call.rows, bits=device_tier.settled_bits)
    try:
        buffers = [
            ledger.empty("staging", (staging.staged_bytes,), torch.uint8, device) for _ in range(staging.buffers)
        ]
        decoded = ledger.empty("staging", (staging.decoded_bytes // host.dtype.itemsize,), host.dtype, device)
        ledger.reserve("scores", staging.scoring_bytes)
        yield Past(device_tier, host, resident, tokens, call.rows, staging.block_tokens, buffers, decoded)
    except BaseException:
        device_tier.copies.drain()  # copies still under way write to the buffers
        raise
    finally:
        ledger.release("staging")
        ledger.release("scores")


def attend_exactly(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    past: Past,
    ahead: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over the new tokens and all of the past: output `(H, n, D)` and lse `(H, n)`.

    query `(H, n, D)`: of the last n of the new tokens, whose keys and values are `(K, >= n, D)`. ahead: `(n,)`, how
    many tokens after it each of them sees as well; None: none.
    """
    runs = [(0, query.shape[1], False)] if ahead is None else _runs(ahead.tolist())
    joined = past.joined(keys.shape[1])
    keys, values = (keys, values) if joined is None else joined
    parts = [_attend_run(query, keys, values, scaling, run) for run in runs]
    out, lse = (torch.cat(part, dim=1) for part in zip(*parts, strict=True)) if len(parts) > 1 else parts[0]
    if joined is None:
        for block in past.blocks(with_values=True):
            out, lse = exact.merge(out, lse, *exact.attend(query, *block, scaling, causal=False))
    return out.to(query.dtype), lse


def _runs(ahead: Sequence[int]) -> list[tuple[int, int, bool]]:
    """Begin and end of runs of tokens that see each other whole, and of the causal ones between them; which it is.

    ahead: how many tokens after it each one sees, up to the end of its run.
    """
    runs, begin, index = [], 0, 0
    while index < len(ahead):
        if ahead[index] == 0:
            index += 1
            continue
        runs += [(begin, index, False)] if index > begin else []
        begin = index + ahead[index] + 1
        runs.append((index, begin, True))
        index = begin
    return [*runs, (begin, len(ahead), False)] if begin < len(ahead) else runs


def _attend_run(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, run: tuple[int, int, bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one of `_runs` over itself and the tokens before it: keys and values end with those of the query."""
    (first, stop, whole), end = run, keys.shape[1] - query.shape[1] + run[1]
    return exact.attend(query[:, first:stop], keys[:, :end], values[:, :end], scaling, causal=not whole)


def score_text_rows(
    query: torch.Tensor,
    lse: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    past: Past,
    tiers: TierConfig,
    looks: Looks | None,
) -> TextRows:
    """Scores of the last `T` new tokens over past and new keys, in a second pass that reads keys only.

    query `(H, T, D)` and lse `(H, T)`: the last rows of the call whose new keys are `(K, n, D)`. looks: records the
    rows' attention to the past.
    """
    t, new = query.shape[1], keys.shape[1]
    total = past.tokens + new
    k = classify.top_k_count(tiers.policy.top_k_ratio, total)
    window = min(t, tiers.policy.saliency_window)
    halves = torch.empty((2, keys.shape[0], total), dtype=torch.float32, device=keys.device)
    best: torch.Tensor | None = None
    done = 0

    def take(weights: torch.Tensor) -> None:
        nonlocal best, done
        if tiers.policy.scores_mass:
            best = classify.merge_top_k(best, weights, k)
        last = weights[:, :, -window:]
        for half in (0, 1):  # a single row counts in both halves
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
    scores = None if best is None else classify.text_centric_scores(best, tiers.policy.score_group).cpu()
    return TextRows(scores, halves.cpu(), window)  # copied once, as every copy waits for the device
