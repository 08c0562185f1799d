"""Stage 3, dynamic heads: which chunks a step attends to.

Shapes: `K` KV heads, `G` query heads per KV head, `n` chunks, `D` head dim.
"""

from __future__ import annotations

import torch


def mean_share(logits: torch.Tensor) -> torch.Tensor:
    """`(K, G, n)` -> `(K, n)`: mean over the group's query heads of the softmax over chunks (FreeKV).

    A maximum lets one sharp head crowd out the others.
    """
    return logits.softmax(-1).mean(1)


def max_share(logits: torch.Tensor) -> torch.Tensor:
    """`(K, G, n)` -> `(K, n)`: maximum over the group's query heads of the softmax over chunks."""
    return logits.softmax(-1).amax(1)


def max_logit(logits: torch.Tensor) -> torch.Tensor:
    """`(K, G, n)` -> `(K, n)`: maximum over the group's query heads of the logits (Quest's rule, for groups)."""
    return logits.amax(1)


GROUPS = {"mean": mean_share, "max": max_share, "max_logit": max_logit}


def chunk_ranks(
    logits: torch.Tensor, chosen: torch.Tensor, group: str, stay: float, parts: torch.Tensor | None = None
) -> torch.Tensor:
    """Ranks `(K, n)` of chunks from logits `(K, G, n)`, by the rule of `GROUPS` named `group`.

    Ranks of the chunks that the previous step chose, mask `(K, n)`, are multiplied by `stay` (ours). parts: ignored.
    """
    ranks = GROUPS[group](logits)
    return torch.where(chosen, ranks * stay, ranks) if stay != 1 else ranks


def log_mass_without(logits: torch.Tensor, chosen: torch.Tensor, constant: torch.Tensor | None = None) -> torch.Tensor:
    """Log-sum-exp `(K, G)` of logits `(K, G, n)` over all chunks but the chosen `(K, n)`, plus `constant` `(K, G)`."""
    mass = logits.masked_fill(chosen.unsqueeze(1), float("-inf")).logsumexp(-1)
    return mass if constant is None else mass + constant


def unseen_share(unselected: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Share of attention mass `(K,)` that a step did not see, mean over the group (ours).

    unselected, seen `(K, G)`: log-sum-exp of the logits that were not attended to, and of those that were. The first is
    only as good as the digests that it is estimated from (`Digest.estimates_mass`).
    """
    return torch.sigmoid(unselected - seen).mean(-1)


MUCH_UNSEEN = 0.1
"""Share of unseen attention mass above which a head selects more chunks."""


def adapted(selected: torch.Tensor, unseen: torch.Tensor, least: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """How many chunks each head selects next, `(K,)`, between `least` and `most` (ours).

    A quarter more where more than `MUCH_UNSEEN` went unseen, a quarter less where less than half of that did.
    """
    quarter = (selected + 3) // 4
    much, little = unseen > MUCH_UNSEEN, unseen < MUCH_UNSEEN / 2
    change = torch.where(much, 1, torch.where(little, -1, 0)) * quarter
    return torch.minimum(torch.maximum(selected + change, least), most)


def likely_counts(selected: torch.Tensor, most: torch.Tensor, per_cent: int) -> torch.Tensor:
    """How many of the best chunks, at most `most` `(K,)`, to copy for a predicted query, for a step that selects
    `selected` `(K,)` (ours). With more than as many, a few more of what the step will miss are found, and half as many
    copied in vain (`benchmarks/ahead.py`)."""
    return torch.minimum((selected * per_cent + 99) // 100, most)


def query_similarity(query: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """`(K,)`: cosine between the queries `(K, G, D)` of two steps, averaged over the group (FreeKV)."""
    return torch.cosine_similarity(query.float(), before.float(), dim=-1).mean(1)
