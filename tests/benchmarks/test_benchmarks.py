"""Every benchmark runs, quickly, on a machine without a card, or says that it cannot; its last line is JSON."""

from __future__ import annotations

import io
import itertools
import json
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch, capfd):
    """`run(name, *options)`: exit code, stdout and stderr of a quick benchmark, run as a script in this process."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def running(name: str, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(FOLDER / name), "--quick", *options])
        try:
            runpy.run_path(str(FOLDER / name), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capfd.readouterr()

    return running


@pytest.fixture
def one_process(monkeypatch):
    """Measurements that a benchmark starts in processes of their own run in this one: each would import torch anew."""
    from tieredkv.session import checkpoint

    start_process = subprocess.run

    def start(command, *arguments_of_run, **options):
        python, script, *arguments = command
        if python != sys.executable:
            return start_process(command, *arguments_of_run, **options)
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
            patch.setattr(sys, "argv", [script, *arguments])
            patch.setattr(checkpoint, "FLOOR_S", checkpoint.FLOOR_S)  # checkpoints.py sets both
            patch.setattr(checkpoint.Checkpoint, "write", checkpoint.Checkpoint.write)
            runpy.run_path(script, run_name="__main__")
        return subprocess.CompletedProcess(command, 0, out.getvalue())

    monkeypatch.setattr(subprocess, "run", start)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "row"),
    [
        ("decode_cpu.py", [], {"tokens", "full_ms", "tiered_ms", "ratio"}),
        ("prefill.py", ["--device", "cpu"], {"tokens", "kind", "seconds", "tokens_per_s"}),
        ("right.py", ["--device", "cpu"], {"family", "ours", "ours_tight", "offloaded", "offloaded_error"}),
        ("fits.py", ["--device", "cpu"], {"shape", "card_gib", "tokens", "kind", "seconds"}),
    ],
)
def test_it_runs_without_a_card(run, one_process, name, options, row):
    code, out, err = run(name, *options)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert {"benchmark", "date", "machine", "versions", "command", "rows"} <= set(result)
    assert result["rows"]
    for one in result["rows"]:
        assert row <= set(one)


@pytest.mark.slow
def test_rows_of_decoding_say_how_they_ran_and_what_was_assumed(run):
    code, out, err = run("decode.py", "--device", "cpu")
    assert code == 0, err
    assert "hits, assumed" in out
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [row["kind"] for row in rows] == [
        "floor", "floor, eager", "full", "full, eager", "tiered", "tiered", "tiered", "copied ahead", "speculative"
    ]  # fmt: skip
    assert all({"shape", "tokens", "ms", "over_floor", "path"} <= row.keys() for row in rows)
    for row in rows[4:]:
        assert (row["budget"], row["scripted"].split(" ")[0], row["evidence"]) == (0.05, "ranks", False)
        assert (row["host_kv_bits"], row["page_bits"], row["chunk_bytes"]) == (8, 8, 8 * 2 * (32 + 2))
        assert row["chunks_per_head"] > 0
    assert [row["hit_rate"] for row in rows[4:7]] == pytest.approx([1, 0, 0.8], abs=0.05)


@pytest.mark.slow
def test_a_row_with_copies_ahead_differs_from_the_one_without_in_nothing_else(run):
    code, out, err = run("decode.py", "--device", "cpu", "--foreseen", "0.5", "--wasted", "0.25")
    assert code == 0, err
    by_kind = {(row["kind"], row.get("target")): row for row in json.loads(out.splitlines()[-1])["rows"]}
    without, ahead, still = by_kind["tiered", 0.8], by_kind["copied ahead", 0.8], by_kind["tiered", 1.0]
    same = {"budget", "chunks_per_head", "slots_per_head", "host_kv_bits", "page_bits", "path"}
    assert {name: ahead[name] for name in same} == {name: without[name] for name in same}
    assert (without["ahead"], ahead["ahead"], ahead["predicted_layers"]) == (False, True, 1)
    assert (ahead["scripted"], ahead["assumed_foreseen"], ahead["assumed_wasted"]) == (
        "ranks and predictions",
        0.5,
        0.25,
    )
    assert (ahead["foreseen"], ahead["wasted"]) == (0.25, 0.125)  # one layer of two is predicted
    assert ahead["missed_bytes_per_step"] == 0.75 * without["missed_bytes_per_step"]
    assert ahead["bytes_per_step"] == ahead["missed_bytes_per_step"] + ahead["ahead_bytes_per_step"]
    assert [row["stall_ms"] for row in (ahead, without, still)] == [
        row["ms"] - still["ms"] for row in (ahead, without, still)
    ]


def test_a_trace_on_a_cpu_is_refused_in_one_sentence(run):
    code, _, err = run("decode.py", "--device", "cpu", "--trace", "trace.json")
    assert code == 2
    assert err.splitlines()[-1].endswith("error: --trace shows the streams of a CUDA device, and a CPU has none")


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("name", ["ingest.py", "shares.py", "evidence.py", "hits.py"])
def test_benchmarks_of_the_bundled_model_run(run, name):
    """ingest.py measures in a process of its own."""
    code, out, err = run(name)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.model
def test_an_ingest_from_the_middle_writes_fewer_checkpoints(run, one_process):
    code, out, err = run("checkpoints.py")
    assert code == 0, err
    rows = {row["kind"]: row for row in json.loads(out.splitlines()[-1])["rows"]}
    assert list(rows) == ["without", "every 0 s", "from the middle"]
    assert rows["without"]["checkpoints"] == rows["without"]["checkpoint_bytes"] == 0
    assert rows["every 0 s"]["checkpoints"] > 0
    assert rows["from the middle"]["checkpoints"] == 0  # one is due after 30 s


@pytest.mark.slow
@pytest.mark.model
def test_less_host_memory_reads_more_from_disk(run):
    code, out, err = run("disk.py")
    assert code == 0, err
    rows = {row["cache"]: row for row in json.loads(out.splitlines()[-1])["rows"]}
    assert list(rows) == ["memory", "disk", "disk, cold", "least, cold"]
    memory, disk, cold, least = rows.values()
    assert memory["host_bytes"] > disk["host_bytes"] > least["host_bytes"]
    assert (memory["read_bytes"], memory["disk_hit_rate"]) == (0, None)
    assert least["read_bytes_per_token"] > disk["read_bytes_per_token"] == cold["read_bytes_per_token"] > 0


@pytest.mark.slow
@pytest.mark.model
def test_fewer_bits_take_fewer_bytes_everywhere(run):
    """Of keys of 32 dimensions in 32 bits, and of 128 in 16; a scale of 2 bytes is stored with each."""
    code, out, err = run("bytes.py", "--models", "bundled", "7b")
    assert code == 0, err
    rows = {(row["model"], row["bits"]): row for row in json.loads(out.splitlines()[-1])["rows"]}
    figures = {"bits", "host_bytes", "link_bytes_per_token", "file_bytes", "decode_ms", "ingest_s"}
    assert all(figures <= set(row) for row in rows.values())
    expected = {("bundled", 8): 34 / 128, ("bundled", 4): 18 / 128, ("7b", 8): 130 / 256, ("7b", 4): 66 / 256}
    for (model, bits), share in expected.items():
        ours, plain = rows[model, bits], rows[model, 16]
        assert ours["host_bytes"] == share * plain["host_bytes"]
        assert ours["link_bytes_per_token"] == pytest.approx(share * plain["link_bytes_per_token"], rel=0.3)
        saved = [row["file_bytes"] - row["host_bytes"] for row in (ours, plain)]
        assert saved[0] == pytest.approx(saved[1], abs=2**16)


def test_predicted_steps_say_what_is_assumed_and_what_is_hidden(run):
    code, out, err = run("predict.py", "--quick")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert "hit rate" in result["assumed"]
    assert any("wasted" in each for each in result["assumed"])
    rows = result["rows"]
    for row in rows:
        parts = ("weights", "attention", "ranking", "launches", "prediction", "link")
        assert row["ms"] == pytest.approx(sum(row[f"{part}_ms"] for part in parts), abs=1e-3)
        assert (row["hidden_ms"] > 0) == row["ahead"]
    pairs = [(one, two) for one, two in itertools.pairwise(rows) if two["ahead"]]
    assert len(pairs) == 3
    for without, ahead in pairs:
        assert without["chosen"] is not ahead["chosen"]
        assert ahead["exposed_share"] < without["exposed_share"] == 1
        assert ahead["link_bytes"] > without["link_bytes"]
    assert {aim["aim"] for aim in result["aims"]} == {"ratio", "exposed_share"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["pcie.py", "decode.py"])
def test_benchmarks_that_need_a_card_say_so(run, name):
    code, _, err = run(name)
    assert code == 2
    assert "there is no CUDA device here" in err
