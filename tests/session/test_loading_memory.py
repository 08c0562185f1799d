"""Host memory that loading a session takes: none for a mapped file, and for a card no more than there is."""

from __future__ import annotations

import pytest
import torch
from helpers import pressed, tier_options

import tieredkv
from tieredkv.errors import BudgetError
from tieredkv.memory import arena, limits
from tieredkv.session import session_file
from tieredkv.storage import tensor_file

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def stored(video_model, processor, frames, tmp_path):
    path = tmp_path / "session.tkv"
    options = {**pressed(video_model, 280, 0.6), "fps": 4, "chunk_tokens": 8, "recent_window": 16}
    with tieredkv.open_session(video_model, frames, processor=processor, **tier_options(**options)) as session:
        session.save(path)
    return tensor_file.read(path)


@pytest.fixture
def mapped(stored, video_model, monkeypatch):
    """Loads the cache to layers on a device, with so many bytes of host memory."""

    def load(device, available, **options):
        monkeypatch.setattr(limits, "available_host_bytes", lambda: available)
        tiers = session_file.tiers_of(stored, options)
        tokens = session_file.state_of(stored).video.tokens
        return session_file.map_cache(stored, video_model.config, tiers, tokens, [device] * 8)

    return load


def record_bytes(stored) -> int:
    return sum(stored.tensor(name).nbytes for name in stored.names if name.endswith(".kv"))


def test_a_copy_for_a_card_is_refused_before_it_is_made(stored, mapped, monkeypatch):
    monkeypatch.setattr(arena, "aligned", lambda *shape: pytest.fail("something was copied"))
    with pytest.raises(
        BudgetError, match=r"session\.tkv in memory that a card reads needs .* give a smaller host_kv_gb"
    ):
        mapped(CARD, record_bytes(stored))  # of which a fifth is left for others


def test_a_copy_for_a_card_is_bound_by_host_kv_gb(stored, mapped):
    small = record_bytes(stored) / 2 / 2**30
    with pytest.raises(BudgetError, match="host_kv_gb allows"):
        mapped(CARD, 10 * record_bytes(stored), host_kv_gb=small)


def test_a_copy_that_fits_is_made_page_aligned_and_the_files_own_pages_are_given_back(stored, mapped, monkeypatch):
    class Locker:
        def __init__(self):
            self.locked = []

        def use(self, card):
            pass

        def lock(self, tensor):
            self.locked.append(tensor)

        def unlock(self, tensor):
            pass

        def close(self):
            pass

    kept = []
    monkeypatch.setattr("tieredkv.cache.device_tier.PageLocker", Locker)
    monkeypatch.setattr(stored, "verify", lambda *names, keep=True: kept.append(keep))
    with mapped(CARD, 2 * record_bytes(stored)) as cache:
        locked = cache.device_tier.locker.locked
        assert sum(tensor.nbytes for tensor in locked) == record_bytes(stored)
        assert all(tensor.data_ptr() % 4096 == 0 for tensor in locked if tensor.numel())
        for layer in cache.tiered_layers:
            layer._check_once()
    assert kept == [False] * len(cache.tiered_layers)


def test_a_mapped_file_takes_no_memory(stored, mapped, monkeypatch):
    monkeypatch.setattr(arena, "aligned", lambda *shape: pytest.fail("something was copied"))
    with mapped(CPU, 1) as cache:
        first = cache.tiered_layers[0].host.records
        name = next(name for name in stored.names if name.endswith(".kv"))
        assert first.data_ptr() == stored.tensor(name).data_ptr()
