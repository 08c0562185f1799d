"""Each check of `tieredkv doctor`, on facts of machines that work and of machines that do not."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from command_line import run

from tieredkv.doctor import checks

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
KERNELS = {
    "fast-delta": {"version": "0.4", "models": ["a_text", "b_text"]},
    "fast-conv": {"version": None, "models": ["b_text", "c_text"]},
}
TORCH = {"version": "2.15.0+cpu"}


def test_every_check_is_ok_on_a_working_machine():
    results = [
        checks.python((3, 12, 1)),
        checks.library("torch", TORCH),
        checks.torchvision({"version": "0.26.0"}, TORCH),
        checks.library("transformers", {"version": "5.17.0.dev0"}),
        checks.cuda(CARD, SMI),
        checks.triton({"version": "3.9.0"}, CARD, "/usr/bin/gcc"),
        checks.kernels({"fast-delta": KERNELS["fast-delta"]}, CARD),
        checks.link(SMI),
        checks.page_locked(CARD, 8 * 2**20),
        checks.host_memory({"machine": 2**34, "allowed": 2**34}),
        checks.codecs({"h264": True, "hevc": True}),
        checks.matplotlib("pytest"),
    ]
    assert {check.state for check in results} == {"ok"}
    assert {check.remedy for check in results} == {""}


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
    "an old card": (checks.cuda(CARD | {"capability": [7, 5]}, SMI), "note", "need 8.0 or newer"),
    "CUDA that fails": (checks.cuda({"error": "OSError: libcudart"}, SMI), "problem", "libcudart"),
    "no Triton beside a card": (checks.triton({"error": "not installed"}, CARD, "gcc"), "note", "pip install triton"),
    "no compiler beside a card": (checks.triton({"version": "3.9.0"}, CARD, None), "problem", "install gcc or clang"),
    "no compiler and no card": (checks.triton({"version": "3.9.0"}, {}, None), "note", "install gcc or clang"),
    "a package with kernels missing beside a card": (
        checks.kernels(KERNELS, CARD),
        "note",
        "no fast-conv: pip install fast-conv; without it b_text, c_text are slower",
    ),
    "kernels unknown": (checks.kernels({"error": "no torch"}, CARD), "note", "fix the problems above"),
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
    "memory unknown": (checks.host_memory({"error": "no torch"}), "note", "fix the problems above"),
    "a codec missing": (checks.codecs({"h264": True, "av1": False}), "problem", "no decoder for av1: "),
    "no PyAV": (checks.codecs({"error": "not installed"}), "problem", "force-reinstall av"),
    "no matplotlib": (checks.matplotlib("no-such-library"), "note", "tieredkv[plot]"),
}


@pytest.mark.parametrize(("check", "state", "text"), BROKEN.values(), ids=BROKEN)
def test_a_fault_is_reported_with_what_to_do(check, state, text):
    assert check.state == state
    assert text in str(check)
    assert check.remedy
    assert "\n" not in str(check)


@pytest.mark.parametrize("smi", [{}, SMI | {"pcie.link.gen.current": "[N/A]"}])
def test_an_unknown_link_is_fine(smi):
    assert checks.link(smi).state == "ok"
    assert "unknown" in checks.link(smi).found


def test_an_idle_link_is_reported_with_its_full_generation():
    check = checks.link(SMI | {"pcie.link.gen.current": "1"})
    assert (check.state, check.found) == ("ok", "PCIe 4 x16 (at 1 now, as usual for an idle card)")


def test_without_a_card_triton_kernels_and_page_locking_are_not_asked_for():
    assert checks.kernels(KERNELS, {"build": None}).state == "ok"
    assert checks.triton({"error": "not installed"}, {}, None).state == "ok"
    assert checks.page_locked({"build": None}, None).state == "ok"


def test_the_floors_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    stated = dict(re.match(r"([a-z]+)>=([\d.]+)", line).groups() for line in project["dependencies"])
    stated["python"] = project["requires-python"].removeprefix(">=")
    assert {name: ".".join(map(str, floor)) for name, floor in checks.FLOORS.items()} == {
        name: stated[name] for name in checks.FLOORS
    }


# ---- the command


def test_the_command_prints_a_line_per_check_and_exits_with_1_if_there_is_a_problem(monkeypatch, capsys):
    found = [checks.Check("python", "ok", "3.12"), checks.Check("card", "note", "no CUDA device", "buy one")]
    monkeypatch.setattr(checks, "examine", lambda: found)
    code, out, _ = run(monkeypatch, capsys, "doctor")
    assert (code, out) == (0, "ok       python        3.12\nnote     card          no CUDA device: buy one\n")
    found.append(checks.Check("torch", "problem", "not installed", "install it"))
    code, out, _ = run(monkeypatch, capsys, "doctor", "--json")
    assert code == 1
    report = json.loads(out)
    assert report["problems"] == 1
    assert report["checks"][2] == {
        "name": "torch",
        "state": "problem",
        "found": "not installed",
        "remedy": "install it",
    }


@pytest.mark.subprocess
def test_this_machine_is_examined(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "doctor", "--json")
    report = json.loads(out)
    names = (
        "python torch torchvision transformers card triton kernels link page-locked memory codecs matplotlib".split()
    )
    assert [check["name"].split()[-1] for check in report["checks"]] == names
    assert code == (1 if report["problems"] else 0)
    assert {"ok"} == {
        check["state"] for check in report["checks"] if check["name"] in ("python", "torch", "transformers")
    }
