"""Cards by name: memory and bandwidth from their data sheets. Rates are GB/s (1e9 bytes)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tieredkv.errors import OptionError


@dataclass(frozen=True, slots=True)
class Card:
    """A card as `plan` knows it."""

    name: str
    gb_s: float
    """Bandwidth of its memory."""
    memory_gib: float | None
    """None: only the bandwidth was given."""


CARDS = tuple(
    Card(name, gb_s, memory_gib)
    for name, memory_gib, gb_s in (
        ("RTX 3050", 8, 224),
        ("RTX 3060", 12, 360),
        ("RTX 3060 8GB", 8, 240),
        ("RTX 3060 Ti", 8, 448),
        ("RTX 3070", 8, 448),
        ("RTX 3070 Ti", 8, 608),
        ("RTX 3080", 10, 760),
        ("RTX 3080 12GB", 12, 912),
        ("RTX 3080 Ti", 12, 912),
        ("RTX 3080 Ti Laptop", 16, 512),
        ("RTX 3090", 24, 936),
        ("RTX 3090 Ti", 24, 1008),
        ("RTX 4060", 8, 272),
        ("RTX 4060 Ti", 8, 288),
        ("RTX 4060 Ti 16GB", 16, 288),
        ("RTX 4070", 12, 504),
        ("RTX 4070 Laptop", 8, 256),
        ("RTX 4070 SUPER", 12, 504),
        ("RTX 4070 Ti", 12, 504),
        ("RTX 4070 Ti SUPER", 16, 672),
        ("RTX 4080", 16, 717),
        ("RTX 4080 Laptop", 12, 432),
        ("RTX 4080 SUPER", 16, 736),
        ("RTX 4090", 24, 1008),
        ("RTX 4090 Laptop", 16, 576),
        ("RTX 5050", 8, 320),
        ("RTX 5060", 8, 448),
        ("RTX 5060 Ti", 8, 448),
        ("RTX 5060 Ti 16GB", 16, 448),
        ("RTX 5070", 12, 672),
        ("RTX 5070 Laptop", 8, 384),
        ("RTX 5070 Ti", 16, 896),
        ("RTX 5070 Ti Laptop", 12, 672),
        ("RTX 5080", 16, 960),
        ("RTX 5090", 32, 1792),
        ("RTX 5090 Laptop", 24, 896),
        ("RTX A2000 12GB", 12, 288),
        ("RTX A4000", 16, 448),
        ("RTX A4500", 20, 640),
        ("RTX A5000", 24, 768),
        ("RTX 2000 Ada", 16, 224),
        ("RTX 4000 Ada", 20, 360),
        ("RTX 4500 Ada", 24, 432),
        ("RTX 5000 Ada", 32, 576),
        ("L4", 24, 300),
        ("A10", 24, 600),
    )
)
"""Cards of 8 to 32 GB whose architecture the kernels are compiled for: memory in GiB, GB/s. Laptop cards are listed
where their memory is not that of the desktop card of the same number."""

_RATE = re.compile(r"\s*(\d+(?:\.\d*)?)\s*GB/?s\s*", re.IGNORECASE)
_MAKER = re.compile(r"nvidia|geforce|rtx|generation|gpu|[^a-z0-9]")
"""What drivers and shops write around a name, and what is not a letter or digit."""


def find_card(card: str | float) -> Card:
    """A card by its name, as drivers, shops or people write it ("NVIDIA GeForce RTX 3060", "3060", "rtx3060 12GB"), or
    one of that many GB/s: with the unit ("360 GB/s"), or a number that is no card's.

    Where a card exists with two memory sizes, the name without one is the card listed without one. Raises
    `OptionError` with the names that are known.
    """
    text = str(card)
    wanted = _plain(text)
    for known in CARDS:
        if wanted in (_plain(known.name), _plain(f"{known.name} {known.memory_gib}GB")):
            return known
    speed = as_rate(card)
    if speed is None:
        names = ", ".join(known.name for known in CARDS)
        raise OptionError(f"card={card!r} is not known: give GB/s, such as '360 GB/s', or one of {names}.")
    return Card(f"{speed:g} GB/s", speed, None)


def as_rate(value: str | float) -> float | None:
    """A number, or text of one with or without the unit GB/s; None if it is anything else."""
    if isinstance(value, bool):
        return None
    match = _RATE.fullmatch(str(value))
    try:
        speed = float(match[1] if match else value)
    except (TypeError, ValueError):
        return None
    return speed if 0 < speed < 1e6 else None


def _plain(name: str) -> str:
    return _MAKER.sub("", name.lower())
