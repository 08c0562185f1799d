"""What of a cache is on disk, and what stays in host memory, if `host_kv_gb` is smaller than the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tieredkv.codecs import PLAIN
from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError
from tieredkv.memory.limits import check_host, host_budget_bytes
from tieredkv.memory.record_cache import RecordCache
from tieredkv.memory.units import GIB, as_gib, ceil_div, different_sizes
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning.sizes import QUESTION_ROOM, first_tokens, host_bytes, records_bytes, stored_bytes

LEAST_SHARE = 32
"""At least one record of so many has room in host memory: with fewer, nearly all that a step misses is read again."""


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Bytes of a cache whose records are on disk."""

    beside_bytes: int
    """Digests, what codecs and digests were fitted to, and the snapshot, in host memory."""
    memory_bytes: int
    """The rest of `host_kv_gb`: questions and answers, and the cache of records."""
    disk_bytes: int

    @property
    def host_bytes(self) -> int:
        """Host memory in all."""
        return self.beside_bytes + self.memory_bytes


def disk_plan(shape: KVShape, tiers: TierConfig, prompt: int, bits: int, stored: bool = False) -> DiskPlan | None:
    """How a session's prompt of `prompt` tokens is divided; None if `host_kv_gb` is None or holds the cache.

    stored: it is loaded from a file, as it is.
    """
    needed = (stored_bytes if stored else host_bytes)(shape, tiers, prompt, bits)
    if tiers.host_kv_gb is None or needed <= tiers.host_kv_gb * GIB:
        return None
    beside = _beside_bytes(shape, tiers, prompt, bits)
    records = records_bytes(shape, tiers, prompt + QUESTION_ROOM, bits)
    first = first_tokens(tiers, prompt + QUESTION_ROOM)
    plain = 0 if bits == PLAIN else records_bytes(shape, tiers, first, PLAIN)
    disk = max(plain, records + plain // shape.num_layers)
    return DiskPlan(beside, max(0, int(tiers.host_kv_gb * GIB) - beside), disk)


def least_bytes(shape: KVShape, tiers: TierConfig, prompt: int, bits: int, after: int = QUESTION_ROOM) -> int:
    """The least host memory for a cache whose records are on disk. after: tokens that follow the prompt, in memory."""
    records = records_bytes(shape, tiers, prompt, bits) // LEAST_SHARE
    tables = RecordCache.table_bytes(shape.kv_heads * ceil_div(prompt + QUESTION_ROOM, tiers.chunk_tokens))
    newer = records_bytes(shape, tiers, max(after, QUESTION_ROOM) + tiers.chunk_tokens, bits)
    return _beside_bytes(shape, tiers, prompt, bits) + records + tables + newer


def to_disk(shape: KVShape, tiers: TierConfig, prompt: int, bits: int, allowed: int, folder: Path) -> list[str]:
    """The option that keeps what `allowed` bytes of host memory do not hold in `folder` on disk, if that has room and
    the option was not given; or none."""
    option = as_gib(allowed * 99 // 100)  # which rounds up, by less than a hundredth
    if tiers.host_kv_gb is not None or least_bytes(shape, tiers, prompt, bits) > float(option) * GIB:
        return []
    plan = disk_plan(shape, replace(tiers, host_kv_gb=float(option)), prompt, bits)
    if plan is None or plan.disk_bytes > shutil.disk_usage(folder).free:
        return []
    return [f"host_kv_gb={option} to keep the rest on disk"]


def _beside_bytes(shape: KVShape, tiers: TierConfig, prompt: int, bits: int) -> int:
    return stored_bytes(shape, tiers, prompt, bits) - records_bytes(shape, tiers, prompt + QUESTION_ROOM, bits)


def check_disk(
    shape: KVShape,
    tiers: TierConfig,
    prompt: int,
    bits: int,
    plan: DiskPlan,
    folder: Path | None,
    remedy: str | Callable[[int], str],
    available: int | None = None,
) -> None:
    """Raise `BudgetError` unless host memory holds its part of a plan, and the disk of `folder` the other.

    folder: None if the records are there already. remedy: as for `check_host`, of the bytes of `host_kv_gb`. available:
    bytes of host memory (None: measured now).
    """
    what = f"the cache of {prompt:,} tokens"
    least, allowed = least_bytes(shape, tiers, prompt, bits), host_budget_bytes(tiers.host_kv_gb)
    if least > allowed:
        needs, given = different_sizes(least, allowed)
        raise BudgetError(
            f"{what} needs {needs} of host memory with the rest of it on disk, host_kv_gb allows {given}: "
            f"the smallest that works is {as_gib(least)}; {_advice(remedy, allowed)}."
        )
    check_host(allowed, tiers.host_kv_gb, f"{what}, with host_kv_gb={tiers.host_kv_gb:g},", "lower it", available)
    if folder is None:
        return
    free = shutil.disk_usage(folder).free
    if plan.disk_bytes > free:
        whole, given = different_sizes(host_bytes(shape, tiers, prompt, bits), allowed)
        needs, left = different_sizes(plan.disk_bytes, free)
        raise BudgetError(
            f"{what} needs {whole} of host memory, host_kv_gb allows {given}; or {needs} of disk, {left} free in "
            f"{folder}: {_advice(remedy, allowed)}, or free some."
        )


def _advice(remedy: str | Callable[[int], str], allowed: int) -> str:
    return remedy(allowed) if callable(remedy) else remedy
