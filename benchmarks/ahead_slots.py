"""The slots of many heads, with and without copies ahead, given what each step selects and what was predicted.

Shapes: `n` heads, `T` steps, `N` chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Outcome:
    """Chunks, summed over heads and steps."""

    selected: int = 0
    missing: int = 0
    """Selected, and in no slot before the step's copies ahead."""
    foreseen: int = 0
    """Those of them that were copied ahead."""
    late: int = 0
    """Selected, and in no slot after the copies ahead: missing and not foreseen, or evicted by them."""
    wasted: int = 0
    """Copied ahead, not selected."""

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


NEVER = -(10**9)


class Slots:
    """Which chunks are resident, and when each was last used: `(n, N)`, of which a head has `room` `(n,)`."""

    def __init__(self, resident: np.ndarray, room: np.ndarray) -> None:
        """resident `(n, N)`: at first; at most `room` of each head."""
        self.resident, self.room = resident.copy(), room
        self.used = np.where(resident, -1, NEVER)

    def bring(self, wanted: np.ndarray, kept: np.ndarray) -> None:
        """Bring `wanted` `(n, N)`, none of them resident, in place of those used longest ago that are not `kept`."""
        over = self.resident.sum(1) + wanted.sum(1) - self.room
        age = np.where(self.resident & ~kept, self.used, np.iinfo(np.int64).max)
        order = age.argsort(1, kind="stable").argsort(1, kind="stable")
        self.resident &= order >= np.maximum(over, 0)[:, None]
        self.resident |= wanted

    def use(self, chosen: np.ndarray, step: int) -> None:
        self.used[chosen] = step


def best(ranks: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mask `(n, N)` of the `counts` `(n,)` best by `ranks` `(n, N)`."""
    order = (-ranks).argsort(1, kind="stable").argsort(1, kind="stable")
    return order < counts[:, None]


def run(
    chosen: np.ndarray,
    predicted: np.ndarray | None,
    resident: np.ndarray,
    room: np.ndarray,
    factor: float,
    known: np.ndarray,
) -> Outcome:
    """All steps. chosen `(T, n, N)`. predicted `(T, n, N)`: ranks; the best `factor` times as many as the step selects
    are copied ahead, as far as they are missing and slots allow; None: nothing is. resident `(n, N)`, room `(n,)`: of
    `Slots`. known `(n,)`: heads of whose layer there is a prediction."""
    slots, total = Slots(resident, room), Outcome()
    for step, now in enumerate(chosen):
        missing = now & ~slots.resident
        ahead = np.zeros_like(missing)
        if predicted is not None:
            likely = best(predicted[step], np.minimum(room, np.rint(factor * now.sum(1)).astype(int)))
            likely &= known[:, None]
            ahead = likely & ~slots.resident
            slots.bring(ahead, likely)
            slots.used[ahead] = step - 1
        late = now & ~slots.resident
        total += Outcome(
            int(now.sum()), int(missing.sum()), int((missing & ahead).sum()), int(late.sum()), int((ahead & ~now).sum())
        )
        slots.bring(late, now)
        slots.use(now, step)
    return total
