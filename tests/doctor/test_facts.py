"""Facts about a machine, among them libraries that cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tieredkv.doctor import checks, facts, probe

SMI = {
    "name": "NVIDIA GeForce RTX 3060",
    "driver_version": "580.65",
    "pcie.link.gen.current": "4",
    "pcie.link.gen.max": "4",
    "pcie.link.width.current": "16",
    "pcie.link.width.max": "16",
}


def library(folder: Path, name: str, text: str) -> None:
    """A fake library that runs `text` when it is imported, found before the real one."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


@pytest.fixture
def beside(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    library(tmp_path, "torch", "")  # the real one is slow to import and not needed here
    return tmp_path


@pytest.mark.subprocess
def test_a_torchvision_that_does_not_fit_is_recognised(beside):
    library(beside, "torchvision", 'raise RuntimeError("operator torchvision::nms does not exist")')
    found = facts.probe()
    assert "error" not in found["torch"]
    check = checks.torchvision(found["torchvision"], found["torch"])
    assert check.state == "problem"
    assert check.found.startswith(f"does not fit torch {found['torch']['version']}")
    assert "error" not in found["codecs"]


@pytest.mark.subprocess
def test_a_library_that_crashes_is_named_and_earlier_facts_are_kept(beside):
    library(beside, "torchvision", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    found = facts.probe()
    assert "version" in found["torch"]
    assert found["torchvision"] == {"error": "importing it crashed (SIGSEGV)"}
    assert found["cuda"] == {"error": "unknown, because an earlier import crashed"}


def test_a_missing_library_is_reported_as_not_installed():
    assert probe.library("no-such-library") == {"error": "not installed"}


def test_a_probe_that_hangs_is_given_up(monkeypatch):
    def hangs(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout, output=b'{"torch": {"version": "9"}}\n')

    monkeypatch.setattr(subprocess, "run", hangs)
    found = facts.probe()
    assert found["torch"] == {"version": "9"}
    assert found["torchvision"] == {"error": "importing it did not end within 300 s"}


def test_a_codec_without_decoder_is_reported(monkeypatch):
    monkeypatch.setitem(probe.DECODERS, "vvc9", ("no-such-codec",))
    found = probe.codecs()
    assert found["h264"] is True
    assert found["vvc9"] is False


def test_packages_with_kernels_are_those_that_decoders_name(monkeypatch):
    from tieredkv.models import families
    from tieredkv.models.families.decoder import Decoder

    two = (Decoder(("a_text",), packages=("pytest", "no-such-kernels")), Decoder(("b_text",), packages=("pytest",)))
    monkeypatch.setattr(families, "DECODERS", two)
    assert probe.kernels() == {
        "pytest": {"version": pytest.__version__, "models": ["a_text", "b_text"]},
        "no-such-kernels": {"version": None, "models": ["a_text"]},
    }


def test_the_probe_finds_the_package_that_started_it(monkeypatch):
    seen = {}

    def remembers(command, env, **options):
        seen.update(env)
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(subprocess, "run", remembers)
    facts.probe()
    first = Path(seen["PYTHONPATH"].split(":")[0])
    assert (first / "tieredkv" / "doctor" / "probe.py").samefile(probe.__file__)


def test_memory_of_the_machine_and_of_the_control_group_are_both_reported(monkeypatch):
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
    assert facts.nvidia_smi() == SMI


@pytest.mark.subprocess
@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 9\n", "not a program", "#!/bin/sh\n"])
def test_an_nvidia_smi_that_fails_gives_no_facts(tmp_path, monkeypatch, script):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(script)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.nvidia_smi() == {}


def test_the_compiler_is_the_one_triton_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts.compiler({}) is None
    assert facts.compiler({"CC": "/opt/cc"}) == "/opt/cc"
    (tmp_path / "clang").touch(0o755)
    assert facts.compiler({}) == str(tmp_path / "clang")
