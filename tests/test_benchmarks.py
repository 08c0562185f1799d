"""Every benchmark runs, quickly, on a machine without a card, or says that it cannot; its last line is JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / name), "--quick", *options], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "row"),
    [
        ("decode_cpu.py", [], {"tokens", "full_ms", "tiered_ms", "ratio"}),
        ("decode.py", ["--device", "cpu"], {"shape", "tokens", "kind", "ms", "over_floor"}),
        ("prefill.py", ["--device", "cpu"], {"tokens", "kind", "seconds", "tokens_per_s"}),
        ("fits.py", ["--device", "cpu"], {"shape", "card_gib", "tokens", "kind", "seconds"}),
    ],
)
def test_it_runs_without_a_card(name, options, row):
    done = run(name, *options)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"benchmark", "date", "machine", "versions", "command", "rows"} <= set(result)
    assert result["rows"]
    for one in result["rows"]:
        assert row <= set(one)


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("name", ["ingest.py", "shares.py", "evidence.py"])
def test_what_the_bundled_model_is_measured_by_runs(name):
    done = run(name)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["pcie.py", "decode.py"])
def test_what_needs_a_card_says_so(name):
    done = run(name)
    assert done.returncode == 2
    assert "there is no CUDA device here" in done.stderr
    assert "Traceback" not in done.stderr
