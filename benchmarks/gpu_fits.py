"""What fits: 131,072 tokens of video with the 7B shape within 24 GiB, by tieredkv and then by transformers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

from gpu_record import Fact, Run, Values


def facts(run: Run) -> list[Fact]:
    case = ("tiny", 1.0, 2000) if run.dry else ("7b", 24.0, 131072)
    return [
        Fact("tiered", 110, partial(one, run, *case, "tiered", 100)),
        Fact("stock", 60, partial(one, run, *case, "stock", 50)),
    ]


def one(run: Run, shape: str, card: float, tokens: int, kind: str, limit_s: float) -> Values:
    """A case of fits.py, in a process of its own whose allocator is limited to the card's memory."""
    command = [sys.executable, str(Path(__file__).with_name("fits.py")), "--device", run.device]
    command += ["--one", shape, str(card), str(tokens), kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit_s)
    if done.returncode:
        raise RuntimeError(f"fits.py ended with {done.returncode}: see gpu.log")
    row: Values = json.loads(done.stdout.splitlines()[-1])
    if "error" in row:  # out of memory is a result
        row["outcome"] = row.pop("error")
    return row
