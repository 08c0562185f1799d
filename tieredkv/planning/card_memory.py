"""What shares a card with the cap: weights, activations, layers that do not grow, CUDA. And the cap that this leaves.

A reserve is a bound, and the parts of it are of three kinds: measured here, reported by users, or ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError
from tieredkv.memory.units import GIB, as_gib
from tieredkv.models.encode import ENCODE_BYTES
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning.cards import Card
from tieredkv.planning.prefill_plan import untiered_prefill_bytes

DRIVER_SHARE = 1 / 40
"""Share of a card's nominal memory that programs do not get. torch reports 7.78 of 8 GiB, 23.7 of 24, 31.37 of 32
(errors in public issues)."""
CONTEXT_BYTES = 640 * 2**20
"""CUDA's context and libraries. Public reports, where an error lists everything in use: 0.42 GiB (RTX 6000 Ada), 0.58
(RTX 5090)."""
WORKSPACE_BYTES = 512 * 2**20
"""Workspaces of matrix products, captured graphs, fragments of torch's allocator, frames larger than the vision tower's
usual call (ours). cuBLAS takes 8 to 32 MiB a stream."""

LEAST_KV_BYTES = GIB // 10
"""What a card must have left for keys and values, whatever the prompt."""


def default_gpu_kv_gb(free_bytes: int, weight_bytes: int, activation_bytes: int) -> float:
    """The cap, in GiB, if none is given: what is left of a card, rounded down to tenths, below 1 GiB to hundredths.

    free_bytes: of the card, with CUDA's context on it. weight_bytes: those not loaded yet. activation_bytes: of
    everything that runs while keys and values are there (`working_bytes`). 0.0: nothing is left.
    """
    left = (free_bytes - weight_bytes - activation_bytes - WORKSPACE_BYTES) / GIB
    steps = 10 if left >= 1 else 100
    return max(0.0, int(left * steps) / steps)


def working_bytes(config: Any, shape: KVShape, tiers: TierConfig, vision: int | None = None) -> int:
    """Device memory, besides weights and the cap, of one video's prefill: the activations of a call of the decoder, of
    one of the vision tower, which run at once, and the layers that do not grow.

    vision: bytes of the tower's call, where the video is known; 0 for a text model.
    """
    if vision is None:
        vision = ENCODE_BYTES
    untiered = untiered_prefill_bytes(shape, tiers, 2 * tiers.prefill_chunk + shape.sliding_window, 1)
    return vision + _decoder_bytes(config, shape, tiers.prefill_chunk) + sum(untiered.values())


def _decoder_bytes(config: Any, shape: KVShape, tokens: int) -> int:
    """Estimated activations of the decoder over `tokens` tokens: for each 8 vectors of the hidden size and 3 of the
    intermediate size, of all experts that it is routed to (ours, as for vision towers).

    0.33 GiB for a 7B model and 2,048 tokens; 0.15 and 0.26 were measured on a card (docs/memory-sizes.md).
    """
    text = config.get_text_config(decoder=True)
    experts = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None)
    inner = (getattr(text, "moe_intermediate_size", None) or 0) * (experts or 0)
    inner = max(inner, getattr(text, "intermediate_size", None) or 0)
    return tokens * shape.itemsize * (8 * text.hidden_size + 3 * inner)


@dataclass(frozen=True, slots=True)
class CardMemory:
    """A card's memory, and what besides the cap would take how much of it."""

    card: Card
    weight_bytes: int
    working_bytes: int

    @property
    def nominal_bytes(self) -> int:
        """As the data sheet states it."""
        return int((self.card.memory_gib or 0) * GIB)

    @property
    def reserve_bytes(self) -> int:
        """What the driver, CUDA and workspaces take."""
        return int(self.nominal_bytes * DRIVER_SHARE) + CONTEXT_BYTES + WORKSPACE_BYTES

    @property
    def left_bytes(self) -> int:
        """For keys and values; negative if there is no room for the rest."""
        return self.nominal_bytes - self.reserve_bytes - self.weight_bytes - self.working_bytes

    @property
    def default_cap(self) -> float:
        """`gpu_kv_gb` on such a card, if none is given."""
        free = self.nominal_bytes - self.reserve_bytes + WORKSPACE_BYTES
        return default_gpu_kv_gb(free, self.weight_bytes, self.working_bytes)

    def check(self, kv_bytes: int, smallest_cap: int, smaller_weights: Callable[[], dict[str, int]]) -> None:
        """Raise `BudgetError` unless this and `kv_bytes` of keys and values fit; the message names what would.

        smallest_cap: with which the prompt can be served. smaller_weights: returns bytes of all weights by the
        `weights=` that would make them so.
        """
        if kv_bytes <= self.left_bytes:
            return
        needed = self.nominal_bytes - self.left_bytes + kv_bytes
        changes = []
        if (cap := self.default_cap) * GIB >= smallest_cap:
            changes.append(f"gpu_kv_gb={cap:g}")
        for weights, nbytes in smaller_weights().items():
            other = CardMemory(self.card, nbytes, self.working_bytes)
            if kv_bytes <= other.left_bytes:
                changes.append(f"weights={weights!r}")
            elif other.default_cap * GIB >= smallest_cap:
                changes.append(f"weights={weights!r} with gpu_kv_gb={other.default_cap:g}")
        raise BudgetError(
            f"the {self.card.name} has {self.card.memory_gib:g} GiB, and this takes {as_gib(needed)}: "
            f"{self.parts(kv_bytes)}. "
            + (f"Give {' or '.join(changes)}." if changes else "Give a smaller model, or fewer tokens (a lower fps).")
        )

    def parts(self, kv_bytes: int) -> str:
        """What takes how much, in words."""
        sizes = {
            "weights": self.weight_bytes,
            "keys and values": kv_bytes,
            "activations": self.working_bytes,
            "CUDA": self.reserve_bytes,
        }
        return ", ".join(f"{name} {nbytes / GIB:.3g}" for name, nbytes in sizes.items())
