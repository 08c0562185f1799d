"""The link's benchmark copies chunks as they are shipped, and predicts as the planner does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def pcie(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import pcie

    return pcie


def test_pieces_are_chunks_of_so_many_tokens_in_each_codec(pcie, tmp_path):
    from gpu_record import Run

    run, memory = Run(tmp_path, dry=True, started=time.time()), torch.zeros(2**21, dtype=torch.int16)
    rows = [row for bits in (16, 8, 4) for row in pcie.scattered(run, memory, 8, bits, 64)]
    pages = [(row["kind"], row["host_kv_bits"], row["page_bits"], row["piece_bytes"]) for row in rows]
    assert pages == [
        ("kernel", 16, 16, 4096), ("kernel", 16, 8, 4096), ("by the host", 16, 16, 4096),
        ("kernel", 8, 8, 2080), ("by the host", 8, 8, 2080),
        ("kernel", 4, 4, 1056), ("by the host", 4, 4, 1056),
    ]  # fmt: skip
    assert all(row["path"] == "eager" and row["gb_s"] > 0 for row in rows)


def test_the_prediction_is_the_planners(pcie):
    from tieredkv.planning.rates import Rates, copy_ms

    waits = pcie.predicted_ms(10.0, 28e6, 28, 25.0) - 10
    assert waits == pytest.approx(28 * copy_ms(1e6, Rates.of(1000, 25.0)))
    assert pcie.predicted_ms(10.0, 0, 28, 25.0) == 10
