"""The benchmarks run and report what they say they report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.model
@pytest.mark.slow
def test_ingest_reports_a_run_per_length(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "ingest.py"),
        "--minutes",
        "0.5",
        "1",
        "--plot",
        str(tmp_path / "p.png"),
    ]
    out = subprocess.run([*command, "--output", str(tmp_path / "o.json")], capture_output=True, text=True, check=True)
    runs = json.loads(out.stdout.splitlines()[-1])
    assert [run["minutes"] for run in runs] == [0.5, 1]
    for run in runs:
        assert run["visual_tokens"] == run["minutes"] * 480
        assert 0 < run["kv_device_peak_bytes"] <= run["kv_cap_bytes"]
        assert run["base_rss_bytes"] < run["peak_rss_bytes"]
        assert run["session_bytes"] > 0.9 * run["kv_host_bytes"]
        assert min(run[name] for name in ("overlap", "ttft_s", "followup_ttft_s", "reingest_s", "load_s")) > 0
        assert {"date", "machine", "versions", "command"} <= run.keys()
    assert json.loads((tmp_path / "o.json").read_text()) == runs
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_committed_results_say_where_they_come_from():
    for path in (BENCHMARKS / "results").glob("*.json"):
        report = json.loads(path.read_text())
        for run in report if isinstance(report, list) else [report]:
            assert {"date", "machine", "versions", "command"} <= run.keys(), path.name
