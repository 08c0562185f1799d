"""The simulated slots of `benchmarks/ahead.py`, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ahead_slots

SCRIPT = Path(ahead_slots.__file__).with_name("ahead.py")


def chosen(*steps: set[int]) -> np.ndarray:
    """One head's selections among six chunks, `(T, 1, 6)`."""
    return np.array([[[chunk in step for chunk in range(6)]] for step in steps])


def run(steps, predicted=None, first=frozenset({0, 1}), room=3, factor=1.0, known=True):
    ranks = None if predicted is None else chosen(*predicted).astype(np.float32)
    return ahead_slots.run(chosen(*steps), ranks, chosen(set(first))[0], np.array([room]), factor, np.array([known]))


def test_without_prediction_every_chunk_in_no_slot_is_late():
    out = run([{0, 1}, {1, 2}, {0, 3}])
    assert (out.selected, out.missing, out.late, out.foreseen, out.wasted) == (6, 2, 2, 0, 0)


def test_the_slot_used_longest_ago_gives_way():
    out = run([{0, 1}, {1, 2}, {2, 3}, {1, 2}])  # 0 gives way to 3, so 1 is still there
    assert out.late == 2


def test_a_right_prediction_leaves_nothing_late():
    steps = [{0, 1}, {1, 2}, {0, 3}]
    out = run(steps, steps)
    assert (out.missing, out.foreseen, out.late, out.wasted) == (2, 2, 0, 0)


def test_a_wrong_prediction_is_wasted_and_may_evict_what_is_needed():
    out = run([{0, 1}, {0, 1}], [{0, 1}, {4, 5}])
    assert (out.missing, out.foreseen, out.wasted) == (0, 0, 2)
    assert out.late == 1


def test_heads_without_a_prediction_copy_nothing_ahead():
    out = run([{0, 1}, {1, 2}], [{0, 1}, {1, 2}], known=False)
    assert (out.foreseen, out.late) == (0, 1)


@pytest.mark.slow
def test_it_runs_on_the_bundled_model(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--models", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    fitted = {row["how"]: row for row in rows if (row["factor"], row["spare"]) == (1.1, 0.2)}
    assert fitted["stream"]["exposed"] < fitted["stream, two layers before"]["exposed"] < 1
