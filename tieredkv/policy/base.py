"""Policy: one way to spend a budget, made of numbers and pure functions. The presets are in `policy.presets`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tieredkv.errors import check_value, check_whole, is_number
from tieredkv.policy.budget import WEIGHTS
from tieredkv.policy.digests import BITS, DIGESTS
from tieredkv.policy.prune import HeadTokens, text_prior
from tieredkv.policy.select import GROUPS

Rank = Callable[[HeadTokens], torch.Tensor]
"""Rank of each token of a static head, `(n,)`; the highest are kept."""
Merge = Callable[[HeadTokens, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Keys and values `(b, D)` to store for the kept tokens `(b,)`, instead of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Which heads are static, each head's budget, which tokens static heads keep and how dynamic heads choose.

    `dataclasses.replace` makes a changed copy: `replace(POLICIES["hybridkv"], theta=0.9)`. Raises `OptionError` on
    construction when a value is outside its range.
    """

    name: str
    source: str = field(repr=False)
    """Where it is from: paper, or "ours"."""
    summary: str = field(repr=False)
    """One paragraph for `tieredkv policies`."""

    head_score: str = "mass"
    """How heads are classified and share the budget. "mass": by the mass of a text row's top k (HybridKV), with the
    fields below. "coverage" (ours): a head is static if tokens chosen by some rows keep `theta` of the other rows'
    attention within an average head's budget; it gets as many as that takes, and dynamic heads share what is left."""
    theta: float = 0.9
    """A KV head is static when its score reaches theta (HybridKV, stage 1). 0: all static; above 1: none."""
    top_k_ratio: float = 0.01
    """k of the text-centric score, as a share of the N cached tokens (ours; the paper leaves k open)."""
    text_window: int = 64
    """At most this many of the last text rows are scored (ours)."""
    score_group: str = "mean"
    """How the scores of a group's query heads are combined: "mean" or "max" (the paper does not mention groups)."""
    type_split: float = 1.0
    """r: the dynamic heads' share of the budget relative to their number (HybridKV, stage 2), 0 < r <= 1."""
    static_weight: str = "need"
    """How static heads share their budget: by 1 - S ("need"), by S ("score") or evenly ("even")."""
    static_floor: float = 0.2
    """Share of the static heads' mean budget that each of them gets at least (AdaKV)."""
    dynamic_floor: float = 1.0
    """Share of the dynamic heads' mean budget that each of them gets at least; the rest is divided in proportion to the
    root of their spread (`policy.budget.by_need`). 1: evenly, as in the paper. Used with the "coverage" score only."""
    saliency_window: int = 32
    """At most this many of the last text rows rank the tokens of static heads (SnapKV's window)."""
    saliency_pool: int = 5
    """Width of the average pool over neighbouring tokens' saliency (SnapKV)."""
    rank: Rank = text_prior
    merge: Merge | None = None
    digest: str = "cuboid"
    """How chunks' keys are summarised for ranking: a name in `policy.digests.DIGESTS`."""
    digest_bits: int = 8
    """Bits per number of a digest, 4 or 8."""
    chunk_group: str = "mean"
    """How the query heads of a group rank chunks together: a name in `policy.select.GROUPS`."""
    stay: float = 1.0
    """Factor on the ranks of the chunks that the previous step attended to: others must rank that much higher to
    replace them, which saves copies (ours). 1: no effect."""
    dense_layers: int = 0
    """Number of first layers whose heads keep everything on the device, beyond any budget (Quest: 2)."""
    reuse_above: float = 2.0
    """A head whose query has at least this cosine with the previous step's query reuses that step's chunks, which had a
    step's time to arrive (FreeKV). The other heads select anew. Above 1: no head reuses chunks."""
    keep_all: bool = False
    """Everything stays on the device: no policy at all. Refused where it does not fit."""

    @property
    def scores_mass(self) -> bool:
        """Whether anything depends on the mass of the rows' top k: which heads are static, or what each gets."""
        decides = self.theta > 0 or self.static_weight != "even"
        return self.head_score == "mass" and self.theta <= 1 and decides

    def __post_init__(self) -> None:
        def wanted(ok: bool, name: str, want: str) -> None:
            check_value(ok, name, getattr(self, name), want)

        for name in ("theta", "top_k_ratio", "type_split", "static_floor", "dynamic_floor", "stay", "reuse_above"):
            wanted(is_number(getattr(self, name)), name, "a finite number")
        for name in ("text_window", "saliency_window", "saliency_pool"):
            check_whole(name, getattr(self, name))
        check_whole("dense_layers", self.dense_layers, 0)
        wanted(self.saliency_pool % 2 == 1, "saliency_pool", "an odd width")
        wanted(0 < self.top_k_ratio <= 1, "top_k_ratio", "a share above 0 and at most 1")
        wanted(0 < self.type_split <= 1, "type_split", "a share above 0 and at most 1")
        wanted(0 <= self.static_floor <= 1, "static_floor", "a share between 0 and 1")
        wanted(0 <= self.dynamic_floor <= 1, "dynamic_floor", "a share between 0 and 1")
        wanted(self.stay >= 1, "stay", "a factor of at least 1")
        logits = self.chunk_group == "max_logit"
        wanted(
            self.stay == 1 or not logits, "stay", "1 with chunk_group='max_logit', which ranks by logits, not shares"
        )
        choices = {
            "head_score": ("mass", "coverage"),
            "score_group": ("mean", "max"),
            "static_weight": tuple(WEIGHTS),
            "digest": tuple(DIGESTS),
            "digest_bits": BITS,
            "chunk_group": tuple(GROUPS),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            same_type = type(value) is type(known[0])
            wanted(same_type and value in known, name, f"one of {', '.join(map(str, known))}")
        wanted(isinstance(self.keep_all, bool), "keep_all", "True or False")
        wanted(callable(self.rank), "rank", "a function of HeadTokens")
        wanted(self.merge is None or callable(self.merge), "merge", "None or a function of HeadTokens and kept tokens")
