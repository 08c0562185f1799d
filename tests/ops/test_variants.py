"""How many variants of a kernel are compiled, and when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tieredkv.cache.preparing import Preparing
from tieredkv.ops.select import TORCH
from tieredkv.ops.triton.variants import bounded


def reports(*cases: str) -> list[dict]:
    """What `variants.py` prints: in a process of its own, where kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "variants.py"
    done = subprocess.run([sys.executable, str(script), *cases], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.subprocess
def test_steps_ask_for_nothing_that_was_not_compiled_ahead():
    """Whatever the layer, the question and the length, ranked or not, in all bits, with evidence and without; and for
    one variant of each kernel."""
    found = reports("ranked", "everything fits", "16 bits", "8 bits", "4 bits", "reuse", "ahead")
    assert len(found) == 14
    for report in found:
        assert (report["later"], report["missing"]) == ([], []), report["case"]
        assert {"_attend_split", "_merge_splits", "_append", "_fetch"} <= report["asked"].keys()
        assert all(count == 1 or name in ("_choose", "_place") for name, count in report["asked"].items())  # or listed
        assert sum(report["ahead"].values()) <= 30


@pytest.mark.subprocess
def test_no_number_of_heads_chunks_slots_or_misses_asks_for_more():
    (report,) = reports("lengths")
    assert report["missing"] == []
    assert report["asked"] <= 9  # choose, place and mass: at most three blocks each


@pytest.mark.parametrize(("count", "block"), [(1, 16), (16, 16), (17, 64), (65, 256), (10**6, 1024)])
def test_blocks_have_few_sizes(count, block):
    assert bounded(count, 16, 1024) == block


def test_what_cannot_be_compiled_ahead_does_not_stop_the_rest():
    done, ops = [], TORCH
    steps = [lambda: done.append(1), lambda: 1 / 0, lambda: done.append(2)]
    preparing = Preparing()
    preparing.start(_with(steps), None, torch.device("cpu"))
    preparing.wait()
    assert done == [1, 2]
    assert list(ops.preparations(None)) == []


def test_nothing_more_is_compiled_for_a_closed_cache():
    done, begun, go_on = [], threading.Event(), threading.Event()
    preparing = Preparing()
    steps = [lambda: (begun.set(), go_on.wait(60)), lambda: done.append(1)]
    preparing.start(_with(steps), None, torch.device("cpu"))
    assert begun.wait(60)
    preparing.stop()
    go_on.set()
    preparing.wait()
    assert done == []


def _with(steps):
    """Operations with these preparations."""

    class Some:
        def preparations(self, expected):
            return iter(steps)

    return Some()
