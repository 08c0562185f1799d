"""Everything that needs a card, in one run, ordered by worth: link, answers, steps, prefill, kernel tests, what fits.

    make gpu                                    or: python benchmarks/gpu.py --out DIR
    python benchmarks/gpu.py --only link steps  parts of it
    python benchmarks/gpu.py --minutes 9        stop after nine minutes, whatever is left
    python benchmarks/gpu.py --dry-run          the same script with small shapes on a CPU

Appends a line of JSON per fact to DIR/gpu.jsonl, on disk as soon as it is known; the first says where it ran. What the
parts print is in DIR/gpu.log and DIR/gpu-fits.log. A part is a process with a time limit, and so is a fact. What fails
becomes a line with the end of its traceback, and the next fact is measured; after an error of the card, in a new
process.

Needs torch with CUDA, triton, transformers, accelerate, numpy, pytest and psutil. Without access to a package index:
`make gpu-wheels` on another machine, copy the folder, and here
`pip install --no-index --no-deps --target beside .gpu-wheels/*.whl` with PYTHONPATH=beside.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_record import Run

ROOT = Path(__file__).parent.parent
NEEDED = ("torch", "triton", "transformers", "accelerate", "numpy", "pytest", "psutil", "safetensors", "PIL", "tqdm")
PARTS = {"link": 75, "answers": 110, "steps": 340, "prefill": 135, "right": 90, "tests": 160, "fits": 170}
"""Each part's time limit in seconds; together more than a run usually takes."""
TOGETHER = ("tests", "fits")
"""Parts that run at the same time, as their times are not compared with others: the tests mostly compile."""


def usual_out(dry: bool) -> Path:
    """Where records go. Those of a dry run are not kept beside a card's."""
    return ROOT / ("runs/gpu-dry" if dry else "benchmarks/results/gpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu; of a dry run runs/gpu-dry")
    parser.add_argument("--minutes", type=float, default=15, help="time limit of the whole run")
    parser.add_argument("--dry-run", action="store_true", help="small shapes on a CPU; measures nothing")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--begun", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        names = " ".join({"PIL": "pillow"}.get(name, name) for name in missing)
        parser.error(f"missing: {names}. With a package index: pip install {names}. Without one: see --help.")
    arguments.out = (arguments.out or usual_out(arguments.dry_run)).resolve()
    if arguments.dry_run:  # kernels then run on a CPU; before Triton is imported
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from gpu_record import Run  # which imports torch

    if arguments.part:
        measure(Run(arguments.out, arguments.dry_run, arguments.started), arguments.part, arguments.begun)
        return 0
    import torch

    if not (arguments.dry_run or torch.cuda.is_available()):
        parser.error("there is no CUDA device here: give --dry-run to see that it runs")
    return orchestrate(arguments)


def measure(run: Run, part: str, begun: Sequence[str] = ()) -> None:
    """Measure and record the facts of one part, but those begun before, in this process."""
    from gpu_record import run_facts

    run_facts(run, part, import_module(f"gpu_{part}").facts(run), set(begun))


def orchestrate(arguments: argparse.Namespace) -> int:
    """Run the parts one after another; 1 if anything failed."""
    from gpu_record import Run, machine

    arguments.out.mkdir(parents=True, exist_ok=True)
    record = arguments.out / "gpu.jsonl"
    record.unlink(missing_ok=True)
    run = Run(arguments.out, arguments.dry_run, arguments.started)
    run.add("origin", "machine", **machine(run))
    deadline = arguments.started + 60 * arguments.minutes
    only = [name for name in arguments.only if name != "right" or (ROOT / "benchmarks" / "right.py").exists()]
    together = [name for name in only if name in TOGETHER]
    groups = [[name] for name in only if name not in TOGETHER] + ([together] if together else [])
    for group in groups:
        if run.dry:
            for name in group:
                run_part(run, name, deadline)
            continue
        threads = [Thread(target=run_part, args=(run, name, deadline)) for name in group]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    errors = Counter(line["part"] for line in lines if "error" in line)
    seconds = round(time.time() - arguments.started)
    print(json.dumps({"benchmark": "gpu", "seconds": seconds, "lines": len(lines), "errors": errors}))
    return 1 if errors else 0


def run_part(run: Run, name: str, deadline: float) -> None:
    """Run a part within its limit and before `deadline`, and print its failures."""
    begin = time.time()
    limit = min(PARTS[name], deadline - begin)
    if limit < 5:
        run.add(name, "part", error="not begun: no time was left")
        return
    if run.dry:
        with (run.out / "gpu.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            measure(run, name)
    else:
        supervise(run, name, begin + limit)
    run.add(name, "part", seconds=time.time() - begin)
    record = (run.out / "gpu.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, record) if line["part"] == name]
    failed = [line["fact"] for line in lines if "error" in line]
    shown = "".join(f", FAILED {fact}" for fact in failed)
    print(f"{name}: {len(lines)} lines in {time.time() - begin:.0f} s{shown}", flush=True)


def supervise(run: Run, name: str, deadline: float) -> None:
    """Run a part in processes of its own until all of its facts have been begun, or its time is over."""
    from gpu_record import RESTART, end_of_log

    begun: list[str] = []
    count = 1
    path = run.out / ("gpu-fits.log" if name == "fits" else "gpu.log")  # as it may run beside another
    while len(begun) < count and time.time() < deadline:
        command = [sys.executable, __file__, "--part", name, "--out", str(run.out), "--started", str(run.started)]
        command += [*(["--dry-run"] if run.dry else []), "--begun", *begun]
        with path.open("ab") as log:
            place = log.tell()
            child = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment(), process_group=0
            )
            try:
                code: int | str = child.wait(timeout=max(1.0, deadline - time.time()))
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                code = "the part's time is over"
        if code == 0:
            return
        with path.open("rb") as log:
            log.seek(place)
            printed = log.read().decode(errors="replace")
        new = re.findall(r"^== (.*)$", printed, flags=re.MULTILINE)
        total = re.search(r"^## (\d+)$", printed, flags=re.MULTILINE)
        if code != RESTART:
            error = f"process ended: {code}"
            run.add(name, new[-1] if new else "start", error=error, end=end_of_log(printed))
        if not new or total is None:
            return
        begun += new
        count = int(total[1])


def environment() -> dict[str, str]:
    """The environment of this process, with the source tree on the path."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **quiet}


if __name__ == "__main__":
    sys.exit(main())
