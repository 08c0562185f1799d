"""Digests: stand-ins for a chunk's keys, to rank chunks by. `base` has the contract, `DIGESTS` the kinds."""

from __future__ import annotations

from typing import Any

from tieredkv.policy.digests import sketch, vectors, walsh
from tieredkv.policy.digests.base import BITS, Digest, Fitted

DIGESTS: dict[str, type[Digest[Any]]] = {
    kind.name: kind
    for kind in (vectors.Mean, vectors.MinMax, vectors.Cuboid, vectors.Segment, sketch.Sketch, walsh.Walsh)
}
"""Every kind by its name."""

__all__ = ["BITS", "DIGESTS", "Digest", "Fitted"]
