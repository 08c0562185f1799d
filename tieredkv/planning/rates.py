"""What a card and its link can do: rates in GB/s (1e9 bytes), latencies, and a wait for the link that follows. Ours.

The constants were measured on one card, an NVIDIA H200 behind PCIe 5 x16, with Qwen2.5-7B's shape and 131,072 tokens in
a captured graph (`benchmarks/results/gpu-h200.jsonl`). For any other card they are *assumed*.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Rates:
    """What a card and its link can do."""

    memory_gb_s: float
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
        weights, attention, ranking = (min(memory, most) for most in (WEIGHTS_GB_S, ATTENTION_GB_S, RANKING_GB_S))
        return Rates(memory, weights, attention, ranking, link_gb_s)


def model_ms(weight_bytes: float, launches: float, rates: Rates) -> float:
    """Products that read so many bytes of weights, and launches of the model's own."""
    return weight_bytes / rates.weights_gb_s / 1e6 + launches * MODEL_LAUNCH_US / 1e3


def ranking_ms(digest_bytes: float, chunks: int, slots: int, rates: Rates) -> float:
    """To rank by so many bytes of digests, choose among `chunks` chunks a head and place in `slots` slots a head;
    without its launches. 0 if there are no digests."""
    if not digest_bytes:
        return 0.0
    return digest_bytes / rates.ranking_gb_s / 1e6 + (chunks * CHOOSE_NS + slots * PLACE_NS) / 1e6


def copy_ms(nbytes: float, rates: Rates) -> float:
    """Of a layer's chunks, so many bytes, from the host."""
    if not nbytes:
        return 0.0
    return GATHER_US / 1e3 + nbytes / (LINK_SHARE * rates.link_gb_s) / 1e6
