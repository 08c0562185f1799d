"""The run on a card, without one: the whole script with small shapes, and what it keeps when a part fails."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
PART = """
import os, time
from gpu_record import Fact

def first(run):
    return [
        Fact("good", 5, lambda: {"ms": 1.23456789}),
        Fact("several", 5, lambda: ({"row": row} for row in range(2))),
        Fact("raises", 5, lambda: 1 / 0),
        Fact("too slow", 0.2, lambda: time.sleep(9)),
        Fact("dies", 5, lambda: os._exit(9)),
        Fact("after", 5, lambda: {"ms": 2}),
    ]

facts = first
"""


@pytest.fixture
def gpu(monkeypatch):
    """The module of the script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    return gpu


def lines(folder):
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


@pytest.mark.subprocess
@pytest.mark.slow
def test_what_fails_becomes_a_line_and_the_rest_is_measured(gpu, tmp_path, monkeypatch):
    from gpu_record import Run

    (tmp_path / "gpu_fake.py").write_text(PART)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    gpu.supervise(Run(tmp_path, True, time.time()), "fake", time.time() + 120)
    by_fact = [(line["fact"], line) for line in lines(tmp_path)]
    assert [fact for fact, _ in by_fact] == ["good", "several", "several", "raises", "too slow", "dies", "after"]
    told = dict(by_fact)
    assert told["good"]["ms"] == 1.2346
    assert told["raises"]["error"] == "ZeroDivisionError: division by zero"
    assert "1 / 0" in "".join(told["raises"]["end"])
    assert told["too slow"]["error"] == "TimeoutError: took longer than 0.2 s"
    assert told["dies"]["error"] == "process ended: 9"
    assert told["after"]["ms"] == 2


@pytest.mark.subprocess
@pytest.mark.slow
def test_a_part_that_hangs_is_ended_and_recorded(gpu, tmp_path, monkeypatch):
    from gpu_record import Run

    hang = (
        'import time\nfrom gpu_record import Fact\nfacts = lambda run: [Fact("hangs", 900, lambda: time.sleep(900))]\n'
    )
    (tmp_path / "gpu_fake.py").write_text(hang)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    begin = time.time()
    gpu.supervise(Run(tmp_path, True, begin), "fake", begin + 1)
    (line,) = lines(tmp_path)
    assert line["error"] == "process ended: the part's time is over"
    assert time.time() - begin < 60


@pytest.fixture
def process_as_it_was():
    """The parts of a dry run are measured in this process: they set a time limit and turn gradients off."""
    handler = signal.getsignal(signal.SIGALRM)
    with torch.enable_grad():
        yield
    signal.signal(signal.SIGALRM, handler)


def test_a_dry_run_leaves_nothing_beside_the_records_of_cards(gpu):
    assert gpu.usual_out(dry=False).parent.name == "results"
    assert gpu.ROOT / "benchmarks" not in gpu.usual_out(dry=True).parents


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted in this process")
def test_the_script_runs_on_a_cpu(gpu, tmp_path, monkeypatch, capsys, process_as_it_was):
    parts = ["link", "answers", "steps", "prefill"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--out", str(tmp_path), "--only", *parts])
    assert gpu.main() == 0, capsys.readouterr().out
    found = lines(tmp_path)
    assert found[0]["part"] == "origin"
    assert {"machine", "date", "versions", "nvidia_smi", "pci", "huge_pages"} <= found[0].keys()
    assert [line for line in found if "error" in line] == []
    assert {line["part"] for line in found} == {"origin", *parts}
    steps = {line["fact"]: line for line in found if line["part"] == "steps"}
    assert steps["ranked, 80 % hits"].keys() >= {
        "ms",
        "over_floor",
        "hit_rate",
        "launches",
        "kernels",
        "path",
        "seal_s",
    }
    by_bits = [steps[f"ranked, 80 % hits{bits}"] for bits in ("", ", 8 bits", ", 4 bits")]
    assert [row["page_bits"] for row in by_bits] == [8, 8, 4]
    assert [row["ahead"] for row in by_bits] == [False] * 3
    without, ahead = steps["ranked, 80 % hits"], steps["ranked, 80 % hits, copied ahead"]
    assert (ahead["ahead"], ahead["slots_per_head"]) == (True, without["slots_per_head"])
    assert {"assumed_foreseen", "assumed_wasted", "foreseen", "wasted", "stall_ms"} <= ahead.keys()
    assert ahead["ahead_bytes_per_step"] > 0
    order = [line["fact"] for line in found]
    assert order.index(ahead["fact"]) == order.index(without["fact"]) + 1
    assert "skipped" in steps["copied ahead, streams"]
    assert steps["copied ahead, equal to without"]["same"]
    plain, *packed = [row["link_bytes_per_step"] for row in by_bits]  # in float32, 32 bits
    assert [share / plain for share in packed] == [pytest.approx(17 / 64), pytest.approx(9 / 64)]
    exact = [line for line in found if line.get("kind") == "everything, 16 bits"]
    assert all(line["eager_to_stock"]["largest"] < 1e-5 for line in exact)
    answers = [line for line in found if "same_tokens" in line]
    assert all(line["same_tokens"] == line["questions"] for line in answers)
    assert len(list(tmp_path.iterdir())) <= 3


def test_a_card_is_asked_for(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "there is no CUDA device here: give --dry-run" in capsys.readouterr().err
