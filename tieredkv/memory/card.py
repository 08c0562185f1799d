"""Memory of CUDA devices, as this process could still use it."""

from __future__ import annotations

import torch


def free_device_bytes(device: torch.device | int) -> int:
    """Bytes that this process can still allocate on a CUDA device: what is free there, and what torch's allocator holds
    without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def cuda_devices(model: torch.nn.Module) -> list[torch.device]:
    """The CUDA devices that a model's weights are on; none if any are elsewhere."""
    devices = list(dict.fromkeys(weight.device for weight in model.parameters()))
    return devices if all(device.type == "cuda" for device in devices) else []
