"""The cap on a CUDA machine if none is given: what the card has left beside weights and activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tieredkv.config import TierConfig
from tieredkv.errors import BudgetError
from tieredkv.memory.card import cuda_devices, free_device_bytes
from tieredkv.memory.units import GIB
from tieredkv.models.kv_shape import model_shape
from tieredkv.models.loading import stored_dtype
from tieredkv.planning.card_memory import WORKSPACE_BYTES, default_gpu_kv_gb, working_bytes
from tieredkv.planning.weight_bytes import weight_bytes


@dataclass(frozen=True, slots=True)
class DefaultCap:
    """A cap that follows from a card, and why. `str()` says it in one line."""

    gpu_kv_gb: float
    free_bytes: int
    """Of the card, beside the weights; of the fullest card, if there are several."""
    working_bytes: int

    def __str__(self) -> str:
        return (
            f"gpu_kv_gb={self.gpu_kv_gb:g}: beside the weights the card has {self.free_bytes / GIB:.3g} GiB free, less "
            f"{self.working_bytes / GIB:.3g} for activations and {WORKSPACE_BYTES / GIB:.3g} for workspaces."
        )


def check_weights_fit(config: Any) -> None:
    """Raise `BudgetError` if a model that is to be loaded to the current card cannot be served there.

    config: quantised, if the weights will be. Without a card nothing is checked.
    """
    if not torch.cuda.is_available():
        return
    dtype = stored_dtype(config)
    parts = weight_bytes(config, dtype)
    weights = parts["decoder_bytes"] + parts["vision_bytes"]
    working = working_bytes(config, model_shape(config, dtype), TierConfig())
    free = free_device_bytes(torch.cuda.current_device())
    if default_gpu_kv_gb(free, weights, working) == 0:
        remedy = "a smaller model" if parts["quantisation"] else "weights='4bit', weights='8bit', or a smaller model"
        raise BudgetError(
            f"the weights take {weights / GIB:.3g} GiB, activations and workspaces "
            f"{(working + WORKSPACE_BYTES) / GIB:.3g}, and the card has {free / GIB:.3g} GiB free: give {remedy}."
        )


def default_cap(model: Any, tiers: TierConfig) -> DefaultCap | None:
    """The default of `gpu_kv_gb` for a loaded model; None on the CPU, where it stays that of `TierConfig`.

    Raises `BudgetError` if the card has nothing left.
    """
    devices = cuda_devices(model)
    if not devices:
        return None
    free = min(map(free_device_bytes, devices))
    working = working_bytes(model.config, model_shape(model.config, model.get_input_embeddings().weight.dtype), tiers)
    cap = DefaultCap(default_gpu_kv_gb(free, 0, working), free, working)
    if cap.gpu_kv_gb == 0:
        raise BudgetError(
            f"the card has {free / GIB:.3g} GiB free beside the weights, and activations and workspaces take "
            f"{(working + WORKSPACE_BYTES) / GIB:.3g}: close what else uses it, or give a smaller model or gpu_kv_gb."
        )
    return cap


def with_default_cap(model: Any, tiers: TierConfig) -> tuple[TierConfig, DefaultCap | None]:
    """`tiers` under the default cap of the model's card, and that cap, if it is on one."""
    cap = default_cap(model, tiers)
    return (tiers, None) if cap is None else (replace(tiers, gpu_kv_gb=cap.gpu_kv_gb), cap)
