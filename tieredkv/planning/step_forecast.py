"""The forecast of one decoding step: what limits it, what it copies and launches, and how long each part takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tieredkv.memory.units import size_text
from tieredkv.planning.ahead_time import SHARES
from tieredkv.planning.decode_plan import FLOOR_RATIO, Bound, WhyAhead, copies_ahead
from tieredkv.planning.step_time import ASSUMED, StepTime

WHY: dict[WhyAhead, str] = {
    "asked": "on, as asked for",
    "more": "on, to attend to more",
    "shorter": "on, for a shorter step",
    "declined": "off, as asked for",
    "unranked": "off: chunks are not ranked",
    "prefetch": "off: prefetch=False",
    "reuse": "off: heads may reuse the choice of the step before (reuse_above)",
    "unknown": "off: no card is known (--card)",
    "unpredicted": "off: this model's queries are not predicted",
    "disk": "off: chunks are on disk",
    "room": "off: what corrects predicted queries does not fit under the cap",
    "longer": "off: a step would take longer, or attend to less",
}
"""Why chunks are copied ahead for predicted queries, in words."""


@dataclass(frozen=True, slots=True)
class StepForecast:
    """Predicted by `step_time`, with the assumptions that it lists."""

    bound: Bound
    """What keeps a step from attending to more."""
    overhead: float | None
    """`step_overhead`."""
    most_copied_bytes: int
    """If nothing that the step selects were on the device."""
    missed_bytes: int
    """Not on the device, at the assumed hit rate and without copies ahead."""
    copied_bytes: int
    """Over the link: those, or with copies ahead more."""
    why_ahead: WhyAhead
    """Why chunks are copied ahead, or are not."""
    predicted_layers: int
    """For which they are, in a step whose time is predicted."""
    ahead_per_cent: int
    """Of the chunks that a step selects, how many likely ones are copied then."""
    launches: int
    """Of kernels, those of the model included."""
    time: StepTime | None
    """None, like the next two, without a card."""
    unhidden_ms: float | None
    """What the step would wait for the link if it attended to the same and nothing were copied ahead."""
    model_ms: float | None
    """Of the model with a cache of one token."""

    @property
    def ahead(self) -> bool:
        """Whether chunks are copied ahead for predicted queries."""
        return copies_ahead(self.why_ahead)

    @property
    def exposed_share(self) -> float | None:
        """Of the link's time, what the step waits for, relative to copying nothing ahead; None without copies."""
        return self.time.link / self.unhidden_ms if self.time is not None and self.unhidden_ms else None

    @property
    def assumed(self) -> tuple[str, ...]:
        """What of the prediction was not measured on the card that it is for."""
        if not self.predicted_layers:
            return ASSUMED
        shares = SHARES[self.ahead_per_cent]
        return (*ASSUMED, f"foreseen {shares.foreseen:.0%}", f"wasted {shares.wasted:.0%}")

    @property
    def hit_rate(self) -> float | None:
        """Assumed; None if nothing is copied."""
        return 1 - self.missed_bytes / self.most_copied_bytes if self.most_copied_bytes else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "bound": self.bound,
            "overhead": self.overhead,
            "missed_bytes": self.missed_bytes,
            "copied_bytes": self.copied_bytes,
            "hit_rate": self.hit_rate,
            "ahead": self.ahead,
            "why_ahead": self.why_ahead,
            "ahead_per_cent": self.ahead_per_cent if self.ahead else None,
            "launches": self.launches,
            "ms": None if self.time is None else {**asdict(self.time), "total": self.time.total},
            "tokens_per_s": None if self.time is None else 1000 / self.time.total,
            "exposed_share": self.exposed_share,
            "model_ms": self.model_ms,
            "assumed": list(self.assumed),
        }

    def copies(self) -> str:
        """What a step copies at the assumed hit rate, in words; empty if it copies nothing."""
        if self.hit_rate is None:
            return ""
        return f"; {size_text(self.missed_bytes)} if {self.hit_rate:.0%} of it is on the device (assumed)"

    def rows(self, card: str) -> list[tuple[str, str]]:
        """Rows of a table of times. card: what a step is predicted for."""
        known = self.why_ahead not in ("unranked", "unknown")
        beginning = [("limited by", self._bound()), *([("copies ahead", self._ahead())] if known else [])]
        if self.time is None or self.model_ms is None:
            return beginning
        total, parts = self.time.total, asdict(self.time)
        del parts["hidden"]
        return [
            *beginning,
            (
                "time per token",
                f"{total:.3g} ms, {1000 / total:.3g} tokens/s; of the model alone {self.model_ms:.3g} ms",
            ),
            ("  at", f"{card}; {self.launches:,} launches"),
            ("  by part, ms", ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items())),
            ("  assumed", ", ".join(self.assumed)),
        ]

    def _ahead(self) -> str:
        if self.time is None or not self.ahead:
            return WHY[self.why_ahead]
        exposed, hidden, spent = self.time.link, self.time.hidden, self.time.prediction
        return (
            f"{WHY[self.why_ahead]}: {size_text(self.copied_bytes)} in all; {hidden:.2f} ms of the link hidden, "
            f"{exposed:.2f} exposed; {spent:.2f} ms to predict"
        )

    def _bound(self) -> str:
        if self.bound == "nothing":
            return "nothing: a step attends to everything"
        if self.bound == "budget_ratio":
            return "budget_ratio"
        if self.bound == "memory":
            beside = "" if self.time else "; on a card the link may allow less (--card)"
            return f"the cap: a step attends to as much as fits{beside}"
        allowed = f"{self.overhead or 0:.0%} of the model's own time (step_overhead={self.overhead:g})"
        if self.bound == "link":
            return f"the link: copies may take {allowed}"
        return f"the least share, {FLOOR_RATIO:.0%}: copies take more than {allowed}"
