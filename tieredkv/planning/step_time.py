"""How long a decoding step takes on a card: milliseconds by part, from bytes, launches and rates. Ours; a prediction.

Every constant here and in `rates` was measured on one card, an NVIDIA H200, with Qwen2.5-7B's shape and 131,072 tokens
in a captured graph (`benchmarks/results/gpu-h200.jsonl`). `tests/planning/test_step_time.py` compares the model with
the record. For any other card they are *assumed*: `ASSUMED` lists what. `ahead_time` predicts what copies ahead change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tieredkv.planning.ahead_time import Lead, Wait, copied_bytes, layer_wait
from tieredkv.planning.rates import LAUNCH_US, Rates, model_ms, ranking_ms

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
    """Of chunks from the host, if nothing is copied ahead."""
    spare: float = 0.0
    """Share of the slots that hold nothing selected."""
    lead: Lead | None = None
    """In which chunks are copied ahead; None: they are not."""

    @property
    def copied_bytes(self) -> float:
        """Copied from the host, ahead and when they are missed."""
        return copied_bytes(self.missed_bytes, self.spare, self.lead)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Milliseconds by part, one after another but for the last."""

    weights: float = 0.0
    """Products and, like the rest of the model, what they launch."""
    attention: float = 0.0
    ranking: float = 0.0
    """Ranking, choosing and placing."""
    launches: float = 0.0
    """Operations on the cache, besides what the other parts count by bytes."""
    link: float = 0.0
    """That the step waits for."""
    prediction: float = 0.0
    """Of queries, for copies ahead: all that these cost but the link."""
    hidden: float = 0.0
    """Of the link, while something else is computed: no part of the total."""

    @property
    def total(self) -> float:
        return self.weights + self.attention + self.ranking + self.launches + self.link + self.prediction

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(
            self.weights + other.weights,
            self.attention + other.attention,
            self.ranking + other.ranking,
            self.launches + other.launches,
            self.link + other.link,
            self.prediction + other.prediction,
            self.hidden + other.hidden,
        )


def work_time(work: Work, rates: Rates) -> StepTime:
    """The time of one layer, or of what comes between."""
    wait = waiting(work, rates)
    return StepTime(
        weights=model_ms(work.weight_bytes, work.model_launches, rates),
        attention=work.page_bytes / rates.attention_gb_s / 1e6,
        ranking=ranking_ms(work.digest_bytes, work.chunks, work.slots, rates),
        launches=work.launches * LAUNCH_US / 1e3,
        link=wait.exposed,
        prediction=wait.prediction,
        hidden=wait.hidden,
    )


def waiting(work: Work, rates: Rates) -> Wait:
    """What of that is due to chunks from the host."""
    return layer_wait(work.missed_bytes, work.digest_bytes, work.chunks, work.slots, work.spare, work.lead, rates)


def step_time(works: Iterable[Work], rates: Rates) -> StepTime:
    """The time of a step."""
    return sum((work_time(work, rates) for work in works), StepTime())


def weights_only_ms(weight_bytes: int, layers: int, rates: Rates) -> float:
    """A step of the model with a cache of one token: what a step is compared with."""
    launches = layers * (MODEL_LAUNCHES + STOCK_LAUNCHES)
    return work_time(Work(weight_bytes, launches), rates).total


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
