"""DecodePhase: what the layers on one device share while decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tieredkv.cache.counters import Counters
from tieredkv.cache.looks import Looks
from tieredkv.config import TierConfig
from tieredkv.memory.copies import BackgroundCopies
from tieredkv.memory.ledger import DeviceLedger
from tieredkv.memory.pool import DevicePool
from tieredkv.models.kv_shape import KVShape
from tieredkv.ops.base import Ops
from tieredkv.planning.decode_plan import DecodePlan


@dataclass(frozen=True, slots=True)
class DecodePhase:
    """One per seal and device; ends when the cache takes prompt tokens again or closes."""

    tiers: TierConfig
    shape: KVShape
    plan: DecodePlan
    ledger: DeviceLedger
    pool: DevicePool
    prefetcher: BackgroundCopies | None
    """None: nothing is fetched ahead."""
    foreseen: bool
    """Whether layers are told their query before they run (`cache.foresight`)."""
    counters: Counters
    """Shared by all devices."""
    ops: Ops
    chunk_mass: torch.Tensor
    """`(N,)` float32 on the device: attention that this step's dynamic heads paid each chunk, summed over layers."""
    page_lse: torch.Tensor | None
    """`(H, P)` float32 on the device, for the widest table: log-sum-exp of the logits of each page that a step attends
    to, written by one layer after the other. None: no head is dynamic."""
    chunk_order: torch.Tensor | None
    """int32 on the device, one for each chunk of a layer's dynamic heads: the column in which a step lists it
    (`Listing`), written by one layer after the other. None: chunks are not ranked."""
    looks: Looks | None
    """Records `chunk_mass`; None: nothing is recorded."""
