"""The forecast of one decoding step: what limits it, what it copies and launches, and how long each part takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tieredkv.memory.units import size_text
from tieredkv.planning.decode_plan import FLOOR_RATIO, Bound
from tieredkv.planning.step_time import ASSUMED, StepTime


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
    """Copied at the assumed hit rate."""
    launches: int
    """Of kernels, those of the model included."""
    time: StepTime | None
    """None, like the next, without a card."""
    model_ms: float | None
    """Of the model with a cache of one token."""

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
            "hit_rate": self.hit_rate,
            "launches": self.launches,
            "ms": None if self.time is None else {**asdict(self.time), "total": self.time.total},
            "tokens_per_s": None if self.time is None else 1000 / self.time.total,
            "model_ms": self.model_ms,
            "assumed": list(ASSUMED),
        }

    def copies(self) -> str:
        """What a step copies at the assumed hit rate, in words; empty if it copies nothing."""
        if self.hit_rate is None:
            return ""
        return f"; {size_text(self.missed_bytes)} if {self.hit_rate:.0%} of it is on the device (assumed)"

    def rows(self, card: str) -> list[tuple[str, str]]:
        """Rows of a table of times. card: what a step is predicted for."""
        if self.time is None or self.model_ms is None:
            return [("limited by", self._bound())]
        total, parts = self.time.total, asdict(self.time).items()
        return [
            ("limited by", self._bound()),
            (
                "time per token",
                f"{total:.3g} ms, {1000 / total:.3g} tokens/s; of the model alone {self.model_ms:.3g} ms",
            ),
            ("  at", f"{card}; {self.launches:,} launches"),
            ("  by part, ms", ", ".join(f"{name} {ms:.2f}" for name, ms in parts)),
            ("  assumed", ", ".join(ASSUMED)),
        ]

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
