"""Sessions whose cache is on disk: where, and how the file of a saved one is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tieredkv.config import TierConfig
from tieredkv.errors import SessionError
from tieredkv.memory.disk_tier import DiskTier, temporary_folder
from tieredkv.models.kv_shape import KVShape, model_shape
from tieredkv.planning.disk_plan import check_disk, disk_plan
from tieredkv.planning.host_plan import prompt_bits
from tieredkv.storage.tensor_file import Stored


def folder_for(session: str | Path | None) -> Path:
    """Where the cache of a session that is to be saved at `session` is kept; None: it may not be saved."""
    return temporary_folder() if session is None else Path(session).absolute().parent


def shape_of(model: Any) -> KVShape:
    """Sizes of a model's keys and values."""
    return model_shape(model.config, model.get_input_embeddings().weight.dtype)


def new_tier(model: Any, tiers: TierConfig, prompt: int, folder: Path) -> DiskTier | None:
    """The disk tier of a new cache for a prompt of `prompt` tokens; None if host memory holds the cache."""
    shape = shape_of(model)
    plan = disk_plan(shape, tiers, prompt, prompt_bits(shape, tiers, prompt))
    return None if plan is None else DiskTier(folder, plan.memory_bytes, shape.num_layers)


def stored_tier(model: Any, tiers: TierConfig, tokens: int, bits: int, stored: Stored) -> DiskTier | None:
    """The disk tier of a saved cache; None if host memory holds it. Raises `BudgetError` if `host_kv_gb` is too small
    even so."""
    shape = shape_of(model)
    plan = disk_plan(shape, tiers, tokens, bits, stored=True)
    if plan is None:
        return None
    check_disk(shape, tiers, tokens, bits, plan, None, "raise it")
    return DiskTier(temporary_folder(), plan.memory_bytes, shape.num_layers, StoredRecords(stored))


class StoredRecords:
    """The file of a saved session, as a `memory.disk_tier.StoredFile`."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    @property
    def descriptor(self) -> int:
        return self._stored.descriptor

    def check(self) -> None:
        """Raise `SessionError` if the file was changed."""
        self._stored.check_unchanged()

    def unreadable(self, reason: str) -> SessionError:
        return SessionError(f"{self._stored.path} could not be read: {reason}. Load it again, or restore it.")

    def offset_of(self, tensor: torch.Tensor) -> int:
        return self._stored.offset_of(tensor)

    def close(self) -> None:
        """Does nothing: the file is closed with the last object that refers to it."""
