"""Packages with kernels for layers that transformers runs by slow references without them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

from tieredkv.models.families import text_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def missing_packages(config: PreTrainedConfig) -> list[str]:
    """Names, as pip has them, of the packages that some layers of this model would use and that are not installed."""

    def installed(package: str) -> bool:
        try:
            return bool(version(package))
        except PackageNotFoundError:
            return False

    packages = text_decoder(config.get_text_config(decoder=True)).packages
    return [package for package in packages if not installed(package)]


def advice(config: PreTrainedConfig, device: torch.device) -> str | None:
    """What to install for a model on `device`; None if nothing is missing, or nothing would help: the kernels need a
    card."""
    missing = missing_packages(config) if device.type == "cuda" else []
    if not missing:
        return None
    return (
        f"some layers of this {config.model_type} run transformers' slow reference in torch: for their kernels, "
        f"pip install {' '.join(missing)}"
    )
