"""Memory of CUDA devices, as this process could still use it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from tieredkv.memory.capturing import CAPTURE


def free_device_bytes(device: torch.device | int) -> int:
    """Bytes that this process can still allocate on a CUDA device: what is free there, and what torch's allocator holds
    without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def return_unused(devices: Sequence[torch.device]) -> None:
    """Return to the driver what torch's allocator holds without using it, if these are CUDA devices: or a block that is
    a little larger than one freed before would be allocated beside it. Waits for the cards, and for captures of other
    sessions."""
    if any(device.type == "cuda" for device in devices):
        with CAPTURE, suppress(RuntimeError):  # older versions of torch refuse after a capture that failed
            torch.cuda.empty_cache()


def cuda_devices(model: torch.nn.Module) -> list[torch.device]:
    """The CUDA devices that a model's weights are on; none if any are elsewhere."""
    devices = list(dict.fromkeys(weight.device for weight in model.parameters()))
    return devices if all(device.type == "cuda" for device in devices) else []


def memory_gb_s(card: torch.device) -> float | None:
    """Bandwidth of a CUDA device's memory, GB/s (1e9 bytes), by clock and width; None if torch does not report them."""
    found = torch.cuda.get_device_properties(card)
    clock_khz, bits = getattr(found, "memory_clock_rate", 0), getattr(found, "memory_bus_width", 0)
    return 2 * clock_khz * 1e3 * bits / 8 / 1e9 or None  # both edges of the clock
