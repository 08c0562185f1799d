"""tieredkv bench: benchmarks are found in a checkout and in an installed package, and run with their own options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run

from tieredkv.cli import bench
from tieredkv.errors import OptionError


def test_every_name_is_a_benchmark():
    assert [name for name in bench.NAMES if not (bench.folder() / f"{name}.py").is_file()] == []


def test_benchmarks_inside_the_package_take_precedence(tmp_path):
    package = tmp_path / "tieredkv"
    for folder in (tmp_path / "benchmarks", package / "benchmarks"):
        folder.mkdir(parents=True)
        (folder / "origin.py").touch()
        assert bench.folder(package) == folder


def test_a_package_without_benchmarks_says_so(tmp_path):
    with pytest.raises(OptionError, match="install tieredkv again"):
        bench.folder(tmp_path / "tieredkv")


def test_an_unknown_name_is_refused_with_the_known_ones(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "bench", "origin")
    assert (code, out) == (2, "")
    assert "'origin' is not a benchmark: give one of decode, decode_cpu" in err


@pytest.mark.subprocess
def test_options_go_to_the_benchmark_and_its_exit_code_comes_back(monkeypatch, capfd):
    code, _, err = run(monkeypatch, capfd, "bench", "ingest", "--", "--quick", "--minutes", "many")  # no torch
    assert code == 2
    assert "--minutes: invalid float value: 'many'" in err


@pytest.mark.subprocess
def test_a_benchmark_runs_and_ends_with_json(tmp_path):
    command = [sys.executable, "-m", "tieredkv", "bench", "decode_cpu", "--", "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(bench.PACKAGE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1])["benchmark"] == "decode_cpu"


@pytest.mark.subprocess
def test_results_go_beside_the_benchmarks_or_into_the_current_folder(tmp_path):
    (tmp_path / "origin.py").write_text((bench.folder() / "origin.py").read_text())
    code = "import sys; sys.path.insert(0, sys.argv[1]); import origin; print(origin.RESULTS)"

    def results(folder: Path) -> str:
        command = [sys.executable, "-c", code, str(folder)]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.strip()

    assert results(tmp_path) == "/"
    assert results(bench.folder()) == str(bench.folder() / "results")
