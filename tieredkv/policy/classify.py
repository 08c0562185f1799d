"""Stage 1: which heads are static. Text-centric scores from the question's own rows.

Shapes: `K` KV heads, `G` query heads per KV head, `T` text rows, `N` cached tokens.
"""

from __future__ import annotations

import math

import numpy as np
import torch


def top_k_count(ratio: float, tokens: int) -> int:
    """k of the score for `tokens` cached tokens: at least 1, at most `tokens`."""
    return max(1, min(tokens, math.ceil(ratio * tokens)))


def merge_top_k(best: torch.Tensor | None, weights: torch.Tensor, k: int) -> torch.Tensor:
    """Fold one block of attention weights into the running top k of each row.

    best: `(K, G, T, <=k)` or None before the first block. weights: `(K, G, T, n)`, a block of rows that are
    normalised over *all* keys. Returns `(K, G, T, min(k, seen))`, unordered.
    """
    block = weights.topk(min(k, weights.shape[-1]), dim=-1, sorted=False).values
    if best is None:
        return block
    both = torch.cat((best, block), dim=-1)
    return both.topk(min(k, both.shape[-1]), dim=-1, sorted=False).values


def text_centric_scores(best: torch.Tensor, group: str = "mean") -> torch.Tensor:
    """S of each KV head, `(K,)` in [0, 1], from the rows' top k `(K, G, T, k)`.

    HybridKV, stage 1: S = mean over text rows of the sum of the row's top-k attention weights. The mean or maximum over
    the group's query heads is ours (the paper does not cover grouped-query attention).
    """
    scores = best.sum(-1).mean(-1)
    return (scores.amax(-1) if group == "max" else scores.mean(-1)).clamp(0.0, 1.0)


def tokens_to_cover(halves: torch.Tensor, sinks: int, recent: int, shares: tuple[float, ...]) -> torch.Tensor:
    """Fewest tokens, chosen by some rows, with which a head keeps each share of *other* rows' attention (ours).

    halves `(2, K, N)` float32 on the host: mean attention of two halves of the text rows. Each half ranks the tokens
    between the first `sinks` and the last `recent`, which a head keeps anyway; of equal ones the earlier comes first.
    The other half's attention to the best of them and to the recent ones is added up, and the sums of both directions
    averaged. Returns `(len(shares), K)`; N + 1 where not even all tokens are enough.

    This measures what pruning by some rows costs other rows. The text-centric score measures how few tokens a row
    attends to, even if every row attends to different ones.

    Attention to the sinks is left out: a head that attends only to them retrieves nothing *yet*, which does not show
    what it would retrieve.

    Nothing is sorted but the few tokens whose weight is close to that of the last one needed.
    """
    old, n = halves.shape[-1] - recent, halves.shape[-1]
    candidates = halves[..., min(sinks, old) : old].numpy()
    kept = halves[..., old:].sum(-1).numpy()
    need = [
        _tokens_to_cover(
            [_Order(candidates[0, head], candidates[1, head]), _Order(candidates[1, head], candidates[0, head])],
            [kept[1, head], kept[0, head]],
            shares,
            n + 1,
        )
        for head in range(halves.shape[1])
    ]
    return torch.tensor(need, dtype=torch.int64, device="cpu").view(-1, len(shares)).T.contiguous()


class _Order:
    """Tokens in descending order of weight, and the sums of what others see in the first of them.

    Weights are not negative, so their bits are ordered as they are. Tokens whose first 16 bits are the same are in one
    bucket; only the order of buckets is known at first.
    """

    def __init__(self, weights: np.ndarray, seen: np.ndarray) -> None:
        """Both `(n,)` float32."""
        self._weights, self._seen = weights, seen
        self._bucket = (weights.view(np.uint32) >> 16 & 0x7FFF).astype(np.intp)  # a sign would only be that of a NaN
        counts = np.bincount(self._bucket, minlength=1)[::-1]
        self._filled = counts.nonzero()[0]
        sums = np.bincount(self._bucket, weights=seen, minlength=1)[::-1][self._filled]
        self._highest = len(counts) - 1
        self.counts = np.concatenate(([0], counts[self._filled].cumsum()))
        """Tokens in the first buckets, for every number of buckets; ascending."""
        self.sums = np.concatenate(([0.0], sums.cumsum()))
        """What others see in them."""

    def within(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the sums of the first `counts` tokens."""
        after = self.counts.searchsorted(counts)
        before = np.where(self.counts[after] == counts, after, after - 1)
        return self.sums[before], self.sums[after]

    def exactly(self, first: int, last: int) -> np.ndarray:
        """The sums of the first `first`, `first` + 1, ..., `last` tokens."""
        begin, end = self.counts.searchsorted(first, "right") - 1, self.counts.searchsorted(last)
        if begin == end:
            return self.sums[begin : begin + 1]
        high, low = self._highest - self._filled[begin], self._highest - self._filled[end - 1]
        tokens = ((self._bucket <= high) & (self._bucket >= low)).nonzero()[0]
        tokens = tokens[np.argsort(-self._weights[tokens], kind="stable")]
        sums = self.sums[begin] + np.concatenate(([0.0], self._seen[tokens].cumsum(dtype=np.float64)))
        return sums[first - self.counts[begin] : last - self.counts[begin] + 1]


def _tokens_to_cover(orders: list[_Order], kept: list[np.float32], shares: tuple[float, ...], never: int) -> list[int]:
    """`tokens_to_cover` of one head. kept: what is seen in the recent tokens, in each direction. never: what stands for
    more than there are."""

    def covered(sums: list[np.ndarray]) -> np.ndarray:
        total = np.zeros_like(sums[0], dtype=np.float32)
        for part, recent in zip(sums, kept, strict=True):
            total = total + part.astype(np.float32) + recent
        return total

    # Bounds change only where a bucket ends in one direction, or just after.
    ends = [order.counts for order in orders]
    counts = np.sort(np.concatenate((*ends, *(each[:-1] + 1 for each in ends))))
    least, most = (covered(list(bound)) for bound in zip(*(order.within(counts) for order in orders), strict=True))
    need = []
    for share in shares:
        target = np.float32(share) * least[-1]
        if not least[-1] >= target:  # or something is NaN
            need.append(never)
            continue
        first, last = (int(counts[np.argmax(bound >= target)]) for bound in (most, least))
        between = covered([order.exactly(first, last) for order in orders])
        need.append(first + int(np.argmax(between >= target)))
    return need


LEAST_ROWS = 16
"""With fewer text rows a head's need is not measured."""
SPREAD_SHARE = 0.9
"""Dynamic heads' budgets are weighted by the tokens that cover this share of their attention."""


def static_heads(scores: torch.Tensor, theta: float) -> torch.Tensor:
    """Boolean mask of static heads, same shape as `scores`: S >= theta (HybridKV, stage 1)."""
    return scores >= theta
