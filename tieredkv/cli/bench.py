"""tieredkv bench: run a benchmark by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from tieredkv.errors import OptionError

NAMES = ("decode", "decode_cpu", "pcie", "prefill", "fits", "right", "quality", "ingest", "bytes", "disk", "serve")
PACKAGE = Path(__file__).parents[1]


def folder(package: Path = PACKAGE) -> Path:
    """Where the benchmarks are: inside an installed package, beside it in a checkout; `OptionError` if nowhere."""
    for found in (package / "benchmarks", package.parent / "benchmarks"):
        if (found / "origin.py").is_file():
            return found
    raise OptionError(f"there are no benchmarks in {package} or beside it: install tieredkv again, or use a checkout.")


def bench(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(NAMES)}.")],
    options: Annotated[list[str] | None, typer.Argument(help="Options of the benchmark, after --.")] = None,
) -> None:
    """Run a benchmark. Its last line is JSON; `tieredkv bench NAME -- --help` describes it.

    In a checkout, files go where its help says; in an installed package, below the current folder. The exit code is
    the benchmark's.
    """
    if name not in NAMES:
        raise OptionError(f"{name!r} is not a benchmark: give one of {', '.join(NAMES)}.")
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, str(folder() / f"{name}.py"), *(options or [])]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=False)
    raise typer.Exit(done.returncode if done.returncode >= 0 else 1)


def add_to(app: typer.Typer) -> None:
    app.command("bench", epilog="Example: tieredkv bench decode_cpu -- --quick")(bench)
