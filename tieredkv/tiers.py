"""What all layers of one cache share while decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tieredkv.config import TierConfig
from tieredkv.decode_plan import DecodePlan
from tieredkv.looks import Looks
from tieredkv.memory.device import DeviceLedger
from tieredkv.memory.pool import DevicePool
from tieredkv.memory.prefetch import Prefetcher
from tieredkv.memory.transfer import Transfer
from tieredkv.ops import Ops
from tieredkv.sizes import KVShape
from tieredkv.stats import Counters


@dataclass(frozen=True, slots=True)
class Tiers:
    """One per seal."""

    config: TierConfig
    shape: KVShape
    plan: DecodePlan
    ledger: DeviceLedger
    pool: DevicePool
    transfer: Transfer
    prefetcher: Prefetcher | None
    counters: Counters
    ops: Ops
    attended: torch.Tensor
    """`(N,)` float32 on the device: attention that this step's dynamic heads have paid each chunk, over layers."""
    looks: Looks | None
    """Where that is kept, if it is recorded at all."""
