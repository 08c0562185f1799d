"""How long a decoding step takes on a card: milliseconds by part, from bytes, launches and rates. Ours; a prediction.

Every constant was measured on one card, an NVIDIA H200 behind PCIe 5 x16, with Qwen2.5-7B's shape and 131,072 tokens in
a captured graph (`benchmarks/results/gpu-h200.jsonl`); `tests/planning/test_step_time.py` compares the model with the
record. For any other card they are *assumed*: `ASSUMED` lists what. Rates are GB/s (1e9 bytes).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MEMORY_SHARE = 0.8
"""Of a card's data-sheet bandwidth, what a kernel gets: measured, a matrix times a vector (3,843 of 4,800 GB/s)."""
WEIGHTS_GB_S = 3240.0
"""The most that the products of one token read, whatever the card: 14.14 GB in 4.36 ms."""
ATTENTION_GB_S = 1760.0
"""The most that attention reads of pages in 8 bits: 3.82 GB in 2.17 ms."""
RANKING_GB_S = 453.0
"""The most that ranking reads of digests: 473 MB in 1.04 ms, logits and ranks."""
CHOOSE_NS = 3.4
"""To choose, for each chunk that a head chooses among: 55.5 us a layer for 16,384; heads run side by side."""
PLACE_NS = 5.1
"""To place, for each slot of a head: 7 us a layer for 1,018, 33 for 6,494."""
GATHER_US = 28.6
"""To fetch, a layer in which anything is missing, besides the link's time: what steps of 74.8 and 333.5 MB imply."""
LINK_SHARE = 0.96
"""Of the rate of one large copy, what a gather gets beyond that: 53.1 of 55.4 GB/s, from the same two steps."""
MODEL_LAUNCH_US = 1.56
"""A kernel launch of the model itself, its work on a few numbers included, and the gap after it: 2.0 ms for 1,280."""
LAUNCH_US = 3.4
"""The same of an operation on the cache: 3.3 to 3.5 us in steps of 1,039 of them."""

MODEL_LAUNCHES = 1139 / 28
"""A layer, without attention and cache; the output layer's are spread over the layers."""
STOCK_LAUNCHES = 5
"""A layer: attention and cache of transformers' step on one token, with which the weights alone are measured."""
LAUNCHES = {"ranked": 12, "unranked": 4}
"""A layer: operations on the cache in a step that ranks chunks, and in one that attends to everything; with evidence,
and chunks in 8 bits. As counted (`tests/streams/test_launches.py`)."""

ASSUMED = ("bandwidth share", "launch time", "ranking", "latency of copies", "hit rate")
"""What of a prediction was not measured on the card that it is for."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a card and its link can do."""

    weights_gb_s: float
    attention_gb_s: float
    ranking_gb_s: float
    link_gb_s: float
    """Of one large copy from page-locked memory."""

    @staticmethod
    def of(card_gb_s: float, link_gb_s: float) -> Rates:
        """A kernel is limited by the card's memory, or by its own work as it was measured. Optimistic for cards with
        few processors, where that work takes longer."""
        memory = MEMORY_SHARE * card_gb_s
        return Rates(min(memory, WEIGHTS_GB_S), min(memory, ATTENTION_GB_S), min(memory, RANKING_GB_S), link_gb_s)


@dataclass(frozen=True, slots=True)
class MissLimit:
    """What a step may spend on chunks that are not on the device."""

    ms: float
    rates: Rates


@dataclass(frozen=True, slots=True)
class Work:
    """What one layer does in a step, or whatever comes between layers."""

    weight_bytes: float = 0.0
    model_launches: float = 0.0
    launches: float = 0.0
    """Of operations on the cache."""
    page_bytes: int = 0
    """Keys and values that attention reads on the device."""
    digest_bytes: int = 0
    """Digests by which chunks are ranked; 0: nothing is."""
    chunks: int = 0
    """That each head chooses among."""
    slots: int = 0
    """Of the head with the most."""
    missed_bytes: float = 0.0
    """Copied from the host."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Milliseconds by part, one after another."""

    weights: float = 0.0
    """Products and, like the rest of the model, what they launch."""
    attention: float = 0.0
    ranking: float = 0.0
    """Ranking, choosing and placing."""
    launches: float = 0.0
    """Operations on the cache, besides what the other parts count by bytes."""
    link: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.attention + self.ranking + self.launches + self.link

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(
            self.weights + other.weights,
            self.attention + other.attention,
            self.ranking + other.ranking,
            self.launches + other.launches,
            self.link + other.link,
        )


def work_time(work: Work, rates: Rates) -> StepTime:
    """The time of one layer, or of what comes between."""
    return StepTime(
        weights=work.weight_bytes / rates.weights_gb_s / 1e6 + work.model_launches * MODEL_LAUNCH_US / 1e3,
        attention=work.page_bytes / rates.attention_gb_s / 1e6,
        ranking=work.digest_bytes / rates.ranking_gb_s / 1e6
        + ((work.chunks * CHOOSE_NS + work.slots * PLACE_NS) / 1e6 if work.digest_bytes else 0.0),
        launches=work.launches * LAUNCH_US / 1e3,
        link=miss_ms(work.missed_bytes, rates),
    )


def step_time(works: Iterable[Work], rates: Rates) -> StepTime:
    """The time of a step."""
    return sum((work_time(work, rates) for work in works), StepTime())


def weights_only_ms(weight_bytes: int, layers: int, rates: Rates) -> float:
    """A step of the model with a cache of one token: what a step is compared with."""
    launches = layers * (MODEL_LAUNCHES + STOCK_LAUNCHES)
    return work_time(Work(weight_bytes, launches), rates).total


def miss_ms(missed_bytes: float, rates: Rates) -> float:
    """A layer's wait for so many bytes from the host."""
    if not missed_bytes:
        return 0.0
    return GATHER_US / 1e3 + missed_bytes / (LINK_SHARE * rates.link_gb_s) / 1e6


def assumed_hit_rate(slots: float, chunks: float) -> float:
    """Share of the selected chunks that are on the device already: *assumed*, where a head has so many slots for so
    many chunks.

    Ours, fitted to the bundled video model with 4,080 to 16,320 tokens, a fortieth to two fifths of the chunks
    selected and up to seven eighths of the slots spare (docs/log.md, "hit rates by slots"): how many chunks have slots
    decides it, hardly how many of those are selected, nor the length. With a twentieth or more selected it is at most 2
    points above what was measured there, and up to 33 below what was measured on text.
    """
    share = slots / chunks if chunks else 1.0
    if share >= 1:
        return 1.0
    return max(0.0, 1.0 - 0.384 * (1.0 - share) * share**-0.105) if share > 0 else 0.0
