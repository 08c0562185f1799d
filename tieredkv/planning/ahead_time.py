"""Copies ahead for predicted queries: what a step no longer waits for, and what they cost. Ours; a prediction.

While the model computes one layer's MLP and the next layer's projections (the lead), a second stream predicts that
layer's query, ranks by it and copies what it finds missing. The layer then waits for that stream, ranks by its true
query and fetches what was not foreseen. Shares are of the chunks that would be missing without copies ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tieredkv.planning.rates import LAUNCH_US, Rates, copy_ms, model_ms, ranking_ms


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the chunks that a layer misses without copies ahead. *Assumed*: as in real steps on SmolLM2 at budgets of 5
    and 10 % (docs/log.md, "how many to copy ahead")."""

    foreseen: float
    """Copied ahead, if slots are plentiful."""
    wasted: float
    """Copied and not selected."""
    given_away: float
    """There, and replaced by copies ahead, so that the layer waits for them again, if no slot is spare. It falls with
    the share of spare slots, as `exp(-spare / SPARE_SCALE)`."""


SHARES = {110: Shares(0.87, 0.62, 0.28), 100: Shares(0.76, 0.24, 0.24), 80: Shares(0.50, 0.09, 0.15)}
"""By how many of the likely chunks are copied, in per cent of those that a step selects: fewer are more often right."""
USUAL = 110
"""What hides most where the lead is long enough."""
SPARE_SCALE = 0.17
LEAD_LAUNCHES = 25
"""Of the model, in a lead: two norms of 8, an MLP of 5 with its sum, three projections."""


@dataclass(frozen=True, slots=True)
class PredictionCost:
    """What it costs to predict one layer's query and to rank by it. All that is assumed of how is in `cost`; what it
    keeps on the device is `sizes.correction_bytes`."""

    weight_bytes: float
    """Read on the second stream."""
    launches: int
    """Of small kernels, on the main stream."""
    launches_aside: int
    """Of small kernels, on the second stream."""
    ranking_launches: int
    """On the second stream: ranking, choosing, placing and the copy."""


@dataclass(frozen=True, slots=True)
class Lead:
    """What a step reads of the weights from when a layer's query can be predicted until it is known."""

    weight_bytes: float
    """The MLP of the layer before (of the experts that a token is routed to), the layer's norm and projections."""
    query_bytes: int
    """The projection of its query, as it is stored."""
    correction_bytes: int
    """What corrects a predicted query."""
    per_cent: int = USUAL
    """How many likely chunks are copied in it: a key of `SHARES`."""


def cost(lead: Lead) -> PredictionCost:
    """The projection is read a second time. Norm, projection, correction and rotation launch 8, 1, 2 and 5 kernels, as
    transformers runs them eagerly; launches as counted (`tests/streams/test_launches.py`)."""
    return PredictionCost(lead.query_bytes + lead.correction_bytes, launches=0, launches_aside=16, ranking_launches=6)


@dataclass(frozen=True, slots=True)
class Wait:
    """Milliseconds of one layer, or of a step."""

    exposed: float = 0.0
    """On the main stream, for chunks from the host."""
    prediction: float = 0.0
    """On the main stream, for what the second stream reads of the device's memory meanwhile, besides copies."""
    hidden: float = 0.0
    """Of copies on the second stream while the model computes."""

    @property
    def total(self) -> float:
        """What the step takes longer."""
        return self.exposed + self.prediction

    def __add__(self, other: Wait) -> Wait:
        return Wait(self.exposed + other.exposed, self.prediction + other.prediction, self.hidden + other.hidden)


def copying(leads: Sequence[Lead | None], per_cent: int) -> tuple[Lead | None, ...]:
    """The same leads, in which so many likely chunks are copied."""
    return tuple(None if lead is None else replace(lead, per_cent=per_cent) for lead in leads)


def foreseen_share(spare: float, per_cent: int = USUAL) -> float:
    """Of a layer's missing chunks, those that it need not fetch itself. spare: share of its slots that are spare.
    per_cent: of `Lead`."""
    shares = SHARES[per_cent]
    return max(0.0, shares.foreseen - shares.given_away * math.exp(-spare / SPARE_SCALE))


def ahead_share(per_cent: int) -> float:
    """Copied ahead, relative to what a layer misses without."""
    return SHARES[per_cent].foreseen + SHARES[per_cent].wasted


def copied_bytes(missed_bytes: float, spare: float, lead: Lead | None) -> float:
    """What a layer copies in all. Arguments as of `layer_wait`."""
    if lead is None:
        return missed_bytes
    return missed_bytes * (1 - foreseen_share(spare, lead.per_cent) + ahead_share(lead.per_cent))


def layer_wait(
    missed_bytes: float, digest_bytes: int, chunks: int, slots: int, spare: float, lead: Lead | None, rates: Rates
) -> Wait:
    """A layer's wait for chunks: for the budget, for `plan` and for the tables.

    missed_bytes: missing without copies ahead. digest_bytes, chunks, slots: as for `rates.ranking_ms`. spare: share of
    the slots that are spare. lead: None: nothing is copied ahead.

    While both streams read the device's memory each delays the other. So the weights and digests that the second reads
    are added to the main one's time, at the rate of the memory. The lead then lasts that much longer, but predicting
    and ranking in it do too: what is late stays the same.
    """
    if lead is None:
        return Wait(copy_ms(missed_bytes, rates))
    spent = cost(lead)
    copied = copy_ms(ahead_share(lead.per_cent) * missed_bytes, rates)
    aside = model_ms(spent.weight_bytes, spent.launches_aside, rates) + spent.ranking_launches * LAUNCH_US / 1e3
    aside += ranking_ms(digest_bytes, chunks, slots, rates) + copied
    late = max(0.0, aside - model_ms(lead.weight_bytes, LEAD_LAUNCHES, rates))
    return Wait(
        exposed=copy_ms((1 - foreseen_share(spare, lead.per_cent)) * missed_bytes, rates) + late,
        prediction=model_ms(0, spent.launches, rates) + (spent.weight_bytes + digest_bytes) / rates.memory_gb_s / 1e6,
        hidden=max(0.0, copied - late),
    )


@dataclass(frozen=True, slots=True)
class Waits:
    """How long steps wait for chunks, and how long they may: what is known when the cap is divided."""

    limit_ms: float
    """For chunks, and for predicting queries so as to wait less; infinity: no limit."""
    rates: Rates
    leads: tuple[Lead | None, ...] = ()
    """Of each tiered layer, None where its query is not predicted. Empty: nothing can be copied while something is
    computed, or no query is predicted."""
    on_disk: bool = False
    """Whether chunks are on disk. Then the host reads them, and launches nothing meanwhile: no copy is hidden."""
