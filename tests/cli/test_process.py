"""The process of a command: how it is interrupted, and what it does when nobody reads its output."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys

import pytest
from helpers import PATIENCE_S

from tieredkv.cli.process import quick_imports

COMMAND = [sys.executable, "-m", "tieredkv"]
IMPORTING = """
import signal, sys
from tieredkv.cli.process import leave, quick_imports

with quick_imports():
    print("ready", flush=True)
    try:
        signal.pause()
    except BaseException:
        print("an import swallowed it")
"""
LEAVING = """
import os, signal, sys
from tieredkv.cli.process import leave

leave()
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.subprocess
def test_an_interrupt_during_imports_cannot_be_swallowed():
    command = [sys.executable, "-c", IMPORTING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (130, "", "tieredkv: interrupted.\n")


@pytest.mark.subprocess
def test_an_interrupt_after_the_end_of_a_command_changes_nothing():
    assert subprocess.run([sys.executable, "-c", LEAVING], check=False, timeout=PATIENCE_S).returncode == 0


@pytest.mark.subprocess
def test_imports_run_without_collections_and_afterwards_everything_is_as_before():
    before = signal.getsignal(signal.SIGINT)
    with quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.subprocess
@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"], ["ask", "--help"]])
def test_output_that_nobody_reads_ends_a_command_quietly(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen([*COMMAND, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True) as process:
        os.close(writing)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (1, "")
