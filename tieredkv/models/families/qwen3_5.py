"""Qwen3.5, dense and with experts: prompts and positions of Qwen3-VL, without its features for deeper layers."""

from __future__ import annotations

from typing import Any

import torch

from tieredkv.models.families.qwen2_vl import Qwen2VL
from tieredkv.models.families.qwen3_vl import Qwen3VL


class Qwen35(Qwen3VL):
    """Adapter for `Qwen3_5ForConditionalGeneration` and `Qwen3_5MoeForConditionalGeneration`."""

    def encode(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return Qwen2VL.encode(self, model, inputs)
