"""What the device that a cache is on can do, for predictions of a step's time."""

from __future__ import annotations

import torch

from tieredkv.errors import OptionError
from tieredkv.memory.card import memory_gb_s
from tieredkv.memory.link import card_link_gb_s
from tieredkv.planning.cards import find_card
from tieredkv.planning.rates import Rates

CPU_GB_S = 50.0
"""Of a CPU's memory, where a link is given: *assumed*, from the weights of `benchmarks/decode_cpu.py` on two cores."""


def machine_rates(device: torch.device, link_gb_s: float | None) -> Rates | None:
    """Rates of a CUDA device, whose link is measured unless it is given, or of a CPU with a link that is given; None
    where one of the two is unknown."""
    if device.type == "cpu":
        return None if link_gb_s is None else Rates.of(CPU_GB_S, link_gb_s)
    if not torch.cuda.is_available():
        return None
    memory = memory_gb_s(device) or _by_name(torch.cuda.get_device_name(device))
    if memory is None:
        return None
    return Rates.of(memory, card_link_gb_s(device) if link_gb_s is None else link_gb_s)


def _by_name(name: str) -> float | None:
    try:
        return find_card(name).gb_s
    except OptionError:
        return None
