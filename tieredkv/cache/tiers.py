"""What all layers of one cache share while decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tieredkv.cache.counters import Counters
from tieredkv.cache.looks import Looks
from tieredkv.config import TierConfig
from tieredkv.memory.copies import BackgroundCopies, Transfer
from tieredkv.memory.ledger import DeviceLedger
from tieredkv.memory.pool import DevicePool
from tieredkv.models.kv_shape import KVShape
from tieredkv.ops.base import Ops
from tieredkv.planning.decode_plan import DecodePlan


@dataclass(frozen=True, slots=True)
class Tiers:
    """One per seal."""

    config: TierConfig
    shape: KVShape
    plan: DecodePlan
    ledger: DeviceLedger
    pool: DevicePool
    transfer: Transfer
    prefetcher: BackgroundCopies | None
    counters: Counters
    ops: Ops
    attended: torch.Tensor
    """`(N,)` float32 on the device: attention that this step's dynamic heads have paid each chunk, over layers."""
    looks: Looks | None
    """Where that is kept, if it is recorded at all."""
