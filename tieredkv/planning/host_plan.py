"""How many bits a number has in host memory: as asked for, or the default for a prompt of this length."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from tieredkv.codecs import PLAIN
from tieredkv.config import TierConfig
from tieredkv.errors import OptionError
from tieredkv.memory.units import GIB, HOST_BITS
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


def possible_bits(shape: KVShape) -> list[int]:
    """All that the host tier of this model can have."""
    return [bits for bits in HOST_BITS if not (bits == 4 and shape.head_dim % 2)]


def reason(shape: KVShape, tiers: TierConfig, prompt: int) -> str:
    """Why `prompt_bits` returns what it does, in words."""
    if tiers.host_kv_bits is not None:
        return "as given"
    if len(page_bits(tiers, PLAIN)) == 1:
        return "as pages are not packed"
    if stays_on_device(shape, tiers, prompt + QUESTION_ROOM):
        return "as all of it stays on the device"
    return "as not all of it stays on the device"


def smaller_settings(shape: KVShape, tiers: TierConfig, prompt: int) -> list[TierConfig]:
    """The settings with fewer bits than a session's prompt of `prompt` tokens would have, most bits first."""
    planned = prompt_bits(shape, tiers, prompt)
    return [replace(tiers, host_kv_bits=bits) for bits in possible_bits(shape) if bits < planned]


def fewer_bits(shape: KVShape, tiers: TierConfig, prompt: int, allowed: int) -> list[str]:
    """The option with which the host tier of a session takes at most `allowed` bytes, or none."""
    for smaller in smaller_settings(shape, tiers, prompt):
        bits = prompt_bits(shape, smaller, prompt)
        if host_bytes(shape, smaller, prompt, bits) <= allowed:
            return [f"host_kv_bits={bits}"]
    return []


def least_bits(shape: KVShape, tiers: TierConfig) -> int:
    """Bits of the host tier under the smallest caps."""
    return default_bits(shape, tiers) if tiers.host_kv_bits is None else tiers.host_kv_bits


def stays_on_device(shape: KVShape, tiers: TierConfig, tokens: int, bits: int = PLAIN) -> bool:
    """Whether steps attend to all of `tokens` tokens and the cap has room for them in pages of so many bits, as
    `host_kv_gb` has in the host tier."""
    layout = lay_out(tiers, tokens, 0, 0)
    needed = pool_bytes(shape, tiers, all_pages(shape, layout), bits) + beside_pool_bytes(shape, tiers, layout, 0)
    if needed > tiers.cap_bytes or old_pages(tiers, layout) < layout.old_chunks:
        return False
    host = host_bytes(shape, tiers, max(0, tokens - QUESTION_ROOM), bits)
    return tiers.host_kv_gb is None or host <= tiers.host_kv_gb * GIB
