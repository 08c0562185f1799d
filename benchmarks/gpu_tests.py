"""The tests that run on a card: how many pass, and the name and the end of each that fails, as they come."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_record import Fact, Run, Values

ROOT = Path(__file__).parent.parent
FILES = [
    "tests/test_gpu.py",
    *sorted(f"tests/ops/{path.name}" for path in (ROOT / "tests/ops").glob("test_kernel*.py")),
]
SHOWN_EVERY = 25
PROCESSES = 8
"""They compile on the host most of the time, and share the card."""


LIMIT_S = 130
"""After which no further test begins. (The exception of a fact's limit would be taken for a test's.)"""


def facts(run: Run) -> list[Fact]:
    return [Fact("pytest", LIMIT_S + 60, lambda: run_tests(run))]


class Recorder:
    """A plugin of pytest that writes failures, and the counts now and then, to the record."""

    def __init__(self, run: Run) -> None:
        self._run, self.counts = run, Counter[str]()
        self._end = time.monotonic() + LIMIT_S
        self._session: Any = None

    def pytest_sessionstart(self, session: Any) -> None:
        self._session = session

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] += 1
        if report.failed:
            end = [line[:200] for line in report.longreprtext.strip().splitlines()[-8:]]
            self._run.add("tests", report.nodeid, outcome="failed", seconds=report.duration, end=end)
        if time.monotonic() > self._end and self._session is not None:
            self._session.shouldstop = f"{LIMIT_S} seconds are over"
        if sum(self.counts.values()) % SHOWN_EVERY == 0:
            self._run.add("tests", "so far", **self.counts)


def run_tests(run: Run) -> Iterator[Values]:
    """Run them without the project's settings, which need plugins that only other tests use."""
    import pytest

    recorder = Recorder(run)
    options = ["-q", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-m", "not slow", "--tb=short"]
    if not run.dry:
        options += ["-n", str(PROCESSES)] if find_spec("xdist") else []
        options += ["--timeout", "60", "--timeout-method", "thread"] if find_spec("pytest_timeout") else []
    else:
        options += ["-k", "test_ties"]
    code = pytest.main([*options, *(str(ROOT / name) for name in FILES)], plugins=[recorder])
    yield {"exit_code": int(code), **recorder.counts}
