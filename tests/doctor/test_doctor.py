"""Each check of `tieredkv doctor` with what is well and what is broken; the probe with libraries that do not import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from command_line import run

from tieredkv.doctor import checks, probe

CARD = {
    "build": "13.0",
    "name": "NVIDIA GeForce RTX 3060",
    "capability": [8, 6],
    "free": 11 * 2**30,
    "total": 12 * 2**30,
    "lock_refusal": None,
}
SMI = {
    "name": "NVIDIA GeForce RTX 3060",
    "driver_version": "580.65",
    "pcie.link.gen.current": "4",
    "pcie.link.gen.max": "4",
    "pcie.link.width.current": "16",
    "pcie.link.width.max": "16",
}
NMS = {"version": "0.26.0", "error": "RuntimeError: operator torchvision::nms does not exist"}
TORCH = {"version": "2.15.0+cpu"}


def test_every_check_is_ok_where_all_is_well():
    made = [
        checks.python((3, 12, 1)),
        checks.library("torch", TORCH),
        checks.torchvision({"version": "0.26.0"}, TORCH),
        checks.library("transformers", {"version": "5.17.0.dev0"}),
        checks.cuda(CARD, SMI),
        checks.triton({"version": "3.9.0"}, CARD, "/usr/bin/gcc"),
        checks.link(SMI),
        checks.page_locked(CARD, 8 * 2**20),
        checks.host_memory({"machine": 2**34, "allowed": 2**34}),
        checks.codecs({"h264": True, "hevc": True}),
        checks.matplotlib("pytest"),
    ]
    assert {check.state for check in made} == {"ok"}
    assert {check.remedy for check in made} == {""}


BROKEN = {
    "an old Python": (checks.python((3, 10, 4)), "problem", "3.10.4: use 3.11 or newer"),
    "no torch": (checks.library("torch", {"error": "not installed"}), "problem", 'pip install "torch>=2.11"'),
    "an old torch": (checks.library("torch", {"version": "2.9.1+cu128"}), "problem", "too old"),
    "an old transformers": (checks.library("transformers", {"version": "4.57.1"}), "problem", ">=5.17"),
    "a torchvision for another torch": (
        checks.torchvision(NMS, TORCH),
        "problem",
        "does not fit torch 2.15.0+cpu (RuntimeError: operator torchvision::nms does not exist): pip install "
        "--force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cpu",
    ),
    "no torchvision": (checks.torchvision({"error": "not installed"}, TORCH), "problem", "torchvision>=0.26"),
    "no card": (checks.cuda({"build": "13.0"}, {}), "note", "no CUDA device"),
    "a card and a torch without CUDA": (checks.cuda({"build": None}, SMI), "problem", "torch is built without CUDA"),
    "a card and an old driver": (
        checks.cuda({"build": "13.0", "why": "The NVIDIA driver on your system is too old"}, SMI),
        "problem",
        "too old): update its driver",
    ),
    "an old card": (checks.cuda(CARD | {"capability": [7, 5]}, SMI), "note", "made for 8.0 and newer"),
    "CUDA that fails": (checks.cuda({"error": "OSError: libcudart"}, SMI), "problem", "libcudart"),
    "no Triton beside a card": (checks.triton({"error": "not installed"}, CARD, "gcc"), "note", "pip install triton"),
    "no compiler beside a card": (checks.triton({"version": "3.9.0"}, CARD, None), "problem", "install gcc or clang"),
    "no compiler and no card": (checks.triton({"version": "3.9.0"}, {}, None), "note", "install gcc or clang"),
    "a narrow slot": (checks.link(SMI | {"pcie.link.width.current": "4"}), "note", "PCIe 4 x4 of x16: copies take 4"),
    "locking refused": (
        checks.page_locked(CARD | {"lock_refusal": "cudaHostRegister failed with CUDA error 1"}, 65536),
        "problem",
        "limit 64 KiB: raise `ulimit -l`",
    ),
    "hardly any memory": (
        checks.host_memory({"machine": 2**34, "allowed": 2**29}),
        "problem",
        "0.5 GiB available, of the machine's 16.0",
    ),
    "memory unknown": (checks.host_memory({"error": "no torch"}), "note", "mend what is a problem above"),
    "a codec missing": (checks.codecs({"h264": True, "av1": False}), "problem", "no decoder for av1: "),
    "no PyAV": (checks.codecs({"error": "not installed"}), "problem", "force-reinstall av"),
    "no matplotlib": (checks.matplotlib("no-such-library"), "note", "tieredkv[plot]"),
}


@pytest.mark.parametrize(("check", "state", "said"), BROKEN.values(), ids=BROKEN)
def test_what_is_wanting_is_said_with_what_to_do(check, state, said):
    assert check.state == state
    assert said in str(check)
    assert check.remedy
    assert "\n" not in str(check)


@pytest.mark.parametrize("smi", [{}, SMI | {"pcie.link.gen.current": "[N/A]"}])
def test_a_link_that_is_not_told_is_fine(smi):
    assert checks.link(smi).state == "ok"
    assert "not known" in checks.link(smi).found


def test_a_link_at_rest_is_told_by_what_it_can():
    check = checks.link(SMI | {"pcie.link.gen.current": "1"})
    assert (check.state, check.found) == ("ok", "PCIe 4 x16 (at 1 now, as cards at rest are)")


def test_without_a_card_triton_and_page_locking_are_not_asked_for():
    assert checks.triton({"error": "not installed"}, {}, None).state == "ok"
    assert checks.page_locked({"build": None}, None).state == "ok"


def test_the_floors_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    stated = dict(re.match(r"([a-z]+)>=([\d.]+)", line).groups() for line in project["dependencies"])
    stated["python"] = project["requires-python"].removeprefix(">=")
    assert {name: ".".join(map(str, floor)) for name, floor in checks.FLOORS.items()} == {
        name: stated[name] for name in checks.FLOORS
    }


# ---- looking


def library(folder: Path, name: str, text: str) -> None:
    """A library of that name that does `text` when it is imported, found before the true one."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


@pytest.fixture
def beside(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    library(tmp_path, "torch", "")  # nothing here needs the true one, which takes its time
    return tmp_path


@pytest.mark.subprocess
def test_a_torchvision_that_does_not_fit_is_recognised(beside):
    library(beside, "torchvision", 'raise RuntimeError("operator torchvision::nms does not exist")')
    facts = checks.probe()
    assert "error" not in facts["torch"]
    check = checks.torchvision(facts["torchvision"], facts["torch"])
    assert check.state == "problem"
    assert check.found.startswith(f"does not fit torch {facts['torch']['version']}")
    assert "error" not in facts["codecs"]


@pytest.mark.subprocess
def test_a_library_that_crashes_is_named_and_what_was_known_before_is_kept(beside):
    library(beside, "torchvision", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    facts = checks.probe()
    assert "version" in facts["torch"]
    assert facts["torchvision"] == {"error": "importing it crashed (SIGSEGV)"}
    assert facts["cuda"] == {"error": "not known, after the one that crashed"}


def test_a_library_that_is_not_there_is_not_installed():
    assert probe.library("no-such-library") == {"error": "not installed"}


def test_a_probe_that_hangs_is_given_up(monkeypatch):
    def hangs(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout, output=b'{"torch": {"version": "9"}}\n')

    monkeypatch.setattr(subprocess, "run", hangs)
    facts = checks.probe()
    assert facts["torch"] == {"version": "9"}
    assert facts["torchvision"] == {"error": "importing it did not end within 300 s"}


def test_a_codec_without_decoder_is_found_out(monkeypatch):
    monkeypatch.setitem(probe.DECODERS, "vvc9", ("no-such-codec",))
    found = probe.codecs()
    assert found["h264"] is True
    assert found["vvc9"] is False


def test_memory_within_a_control_groups_limit_is_told_beside_the_machines(monkeypatch):
    monkeypatch.setattr("tieredkv.memory.limits.available_host_bytes", lambda: 5)
    found = probe.host()
    assert found["allowed"] == 5
    assert found["machine"] > 5


SMI_SCRIPT = """#!{python}
import sys
wanted = sys.argv[1].removeprefix("--query-gpu=").split(",")
assert "pcie.link.gen.current" in wanted and "driver_version" in wanted
print("NVIDIA GeForce RTX 3060, 580.65, 4, 4, 16, 16")
print("NVIDIA GeForce RTX 3060, 580.65, 4, 4, 4, 16")
"""


@pytest.mark.subprocess
def test_nvidia_smi_is_asked_for_the_first_card(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI_SCRIPT.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.nvidia_smi() == SMI


@pytest.mark.subprocess
@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 9\n", "not a program", "#!/bin/sh\n"])
def test_an_nvidia_smi_that_fails_tells_nothing(tmp_path, monkeypatch, script):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(script)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.nvidia_smi() == {}


def test_the_compiler_is_the_one_triton_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.compiler({}) is None
    assert checks.compiler({"CC": "/opt/cc"}) == "/opt/cc"
    (tmp_path / "clang").touch(0o755)
    assert checks.compiler({}) == str(tmp_path / "clang")


# ---- the command


def test_the_command_prints_a_line_per_check_and_its_exit_code_tells_of_problems(monkeypatch, capsys):
    found = [checks.Check("python", "ok", "3.12"), checks.Check("card", "note", "no CUDA device", "buy one")]
    monkeypatch.setattr(checks, "examine", lambda: found)
    code, out, _ = run(monkeypatch, capsys, "doctor")
    assert (code, out) == (0, "ok       python        3.12\nnote     card          no CUDA device: buy one\n")
    found.append(checks.Check("torch", "problem", "not installed", "install it"))
    code, out, _ = run(monkeypatch, capsys, "doctor", "--json")
    assert code == 1
    made = json.loads(out)
    assert made["problems"] == 1
    assert made["checks"][2] == {"name": "torch", "state": "problem", "found": "not installed", "remedy": "install it"}


@pytest.mark.subprocess
def test_this_machine_is_examined(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "doctor", "--json")
    made = json.loads(out)
    names = "python torch torchvision transformers card triton link page-locked memory codecs matplotlib".split()
    assert [check["name"].split()[-1] for check in made["checks"]] == names
    assert code == (1 if made["problems"] else 0)
    assert {"ok"} == {
        check["state"] for check in made["checks"] if check["name"] in ("python", "torch", "transformers")
    }
