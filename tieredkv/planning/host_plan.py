"""How many bits a number has in host memory: as asked for, or the default for a prompt of this length."""

from __future__ import annotations

from functools import lru_cache

from tieredkv.codecs import PLAIN
from tieredkv.config import TierConfig
from tieredkv.errors import OptionError
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import KVShape
from tieredkv.planning.sizes import (
    QUESTION_ROOM,
    all_pages,
    beside_pool_bytes,
    host_bytes,
    lay_out,
    old_pages,
    page_bits,
    pool_bytes,
)

DEFAULT_BITS = 8
"""Where not everything stays on the device: the fewest bits with no measured loss (docs/log.md)."""


@lru_cache(maxsize=256)
def host_bits(shape: KVShape, tiers: TierConfig, tokens: int) -> int:
    """Bits of the host tier of a cache with room for `tokens` tokens, `QUESTION_ROOM` of them after a session's prompt.

    By default 16 if steps attend to everything and all of it fits on the device unpacked: nothing then crosses the
    link, and answers are those of a full cache. Always 16 where pages may not be packed. Raises `OptionError` where the
    model's keys cannot have the bits that were asked for.
    """
    if tiers.host_kv_bits == 4 and shape.head_dim % 2:
        raise OptionError(
            f"host_kv_bits=4 stores numbers in pairs, and this model's keys have {shape.head_dim}: give 8 or 16."
        )
    if tiers.host_kv_bits is not None:
        return tiers.host_kv_bits
    if stays_on_device(shape, tiers, tokens):
        return PLAIN
    return default_bits(shape, tiers)


def default_bits(shape: KVShape, tiers: TierConfig) -> int:
    """Bits of the host tier of a prompt that does not stay on the device whole, unless others are asked for."""
    if len(page_bits(tiers, PLAIN)) == 1:
        return PLAIN
    return 8 if shape.head_dim % 2 else DEFAULT_BITS


def prompt_bits(shape: KVShape, tiers: TierConfig, prompt: int) -> int:
    """Bits of the host tier of a session whose prompt has `prompt` tokens."""
    return host_bits(shape, tiers, prompt + QUESTION_ROOM)


def least_bits(shape: KVShape, tiers: TierConfig) -> int:
    """Bits of the host tier under the smallest caps."""
    return default_bits(shape, tiers) if tiers.host_kv_bits is None else tiers.host_kv_bits


def stays_on_device(shape: KVShape, tiers: TierConfig, tokens: int, bits: int = PLAIN) -> bool:
    """Whether steps attend to all of `tokens` tokens, and pages of so many bits hold them under the cap; and whether the
    host tier has room for them in as many bits under `host_kv_gb`."""
    layout = lay_out(tiers, tokens, 0, 0)
    needed = pool_bytes(shape, tiers, all_pages(shape, layout), bits) + beside_pool_bytes(shape, tiers, layout, 0)
    if needed > tiers.cap_bytes or old_pages(tiers, layout) < layout.old_chunks:
        return False
    host = host_bytes(shape, tiers, max(0, tokens - QUESTION_ROOM), bits)
    return tiers.host_kv_gb is None or host <= tiers.host_kv_gb * GIB
