"""The benchmark of the server runs, and its figures are those of a server that keeps its rules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

ROOT = Path(__file__).parents[2]


@pytest.mark.subprocess
@pytest.mark.slow
def test_the_smallest_run(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["statuses"].keys() == {"200", "429"}
    assert sum(result["statuses"].values()) == result["clients"] == 100
    assert result["retry_after"] == result["statuses"]["429"]
    assert result["first_ms"] > result["follow_up_ms"]
    assert result["idle_share"] < 0.1
