"""The command line, run in the process of the tests."""

from __future__ import annotations

import sys

import pytest

from tieredkv.cli import app


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `tieredkv ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["tieredkv", *arguments])
    with pytest.raises(SystemExit) as stop:
        app.execute()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err
