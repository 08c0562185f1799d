"""What checkpoints cost an ingest, and what they save: time, memory and bytes written, on the bundled model.

    python benchmarks/checkpoints.py [--minutes 60] [--rounds 3] [--floors 30 2 0] [--output checkpoints.json]

A video is generated and ingested, each time in a process of its own, in turn: without checkpoints; with one at least
every `floor` seconds, for each floor (30 is the product's; the bundled model is so quick that shorter ones show more),
at most a share of the time as always; and from a checkpoint of the first half. Prints a table of medians over the
rounds and ends with one JSON line: `ingest_s`, `peak_rss_bytes`, `checkpoints` and the seconds (`checkpoint_s`), the
share of the ingest (`share`) and the bytes (`checkpoint_bytes`) that they took.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from origin import processor_name, versions

KIB = 1024 if sys.platform == "linux" else 1
CARDS, SEED = 12, 1_300_000


class Stopped(Exception):
    """The ingest has been stopped, at its middle."""


def measure(path: Path, floor: float | None, half: bool) -> dict[str, Any]:
    """One ingest in this process. floor: None: without checkpoints. half: continued from the middle."""
    import tieredkv
    from tieredkv.session import checkpoint
    from tieredkv.tiny import model as tiny

    model, processor = tiny.load()
    options = {"gpu_kv_gb": 0.008, "processor": processor, "fps": tiny.FPS}
    folder = None if floor is None else path.with_suffix(".checkpoint")
    if half:
        stop_in_the_middle(model, path, folder, options)
    checkpoint.FLOOR_S = floor or 0.0
    written: list[Any] = []
    write = checkpoint.Checkpoint.write

    def counted(self: Any, *arguments: Any) -> None:
        write(self, *arguments)
        written.append((self._spent, self._blocks[-1].end))

    checkpoint.Checkpoint.write = counted  # type: ignore[method-assign]
    started = time.perf_counter()
    with tieredkv.open_session(model, path, checkpoint=folder, **options) as session:
        ingest_s = time.perf_counter() - started
        session.save(path.with_suffix(".tkv"))
    spent, nbytes = written[-1] if written else (0.0, 0)
    return {
        "ingest_s": ingest_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB,
        "checkpoints": len(written),
        "checkpoint_s": spent,
        "share": spent / ingest_s,
        "checkpoint_bytes": nbytes,
    }


def stop_in_the_middle(model: Any, path: Path, folder: Path | None, options: dict[str, Any]) -> None:
    """Leave a checkpoint of the first half of the video."""
    import tieredkv
    from tieredkv.session import checkpoint

    due, write = checkpoint.Checkpoint.is_due, checkpoint.Checkpoint.write
    expected = tieredkv.plan(model, path, **options).prompt_tokens

    def is_middle(self: Any, cache: Any) -> bool:
        return 2 * cache.get_seq_length() >= expected

    def last(self: Any, *arguments: Any) -> None:
        write(self, *arguments)
        raise Stopped

    checkpoint.Checkpoint.is_due, checkpoint.Checkpoint.write = is_middle, last  # type: ignore[method-assign]
    with suppress(Stopped):
        tieredkv.open_session(model, path, checkpoint=folder, **options)
    checkpoint.Checkpoint.is_due, checkpoint.Checkpoint.write = due, write  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--floors", type=float, nargs="+", default=[30, 2, 0])
    parser.add_argument("--output", type=Path, help="also write the JSON here, indented")
    parser.add_argument("--quick", action="store_true", help="one minute, once")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        path, floor, half = arguments.one
        print(json.dumps(measure(Path(path), floor, half)))
        return
    if arguments.quick:
        arguments.minutes, arguments.rounds, arguments.floors = 1.0, 1, [0]

    import torch

    from tieredkv.tiny.scene import make_scene
    from tieredkv.tiny.video import write_video

    kinds = {"without": (None, False), **{f"every {floor:g} s": (floor, False) for floor in arguments.floors}}
    kinds["from the middle"] = (30.0, True)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(make_scene(SEED, round(arguments.minutes * 60), CARDS), Path(folder) / "film.mp4")
        for _ in range(arguments.rounds):
            for kind, (floor, half) in kinds.items():
                command = [sys.executable, __file__, "--one", json.dumps([str(path), floor, half])]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                runs[kind].append(json.loads(out.splitlines()[-1]))
    rows = [
        {"kind": kind, **{name: statistics.median(run[name] for run in each) for name in each[0]}}
        for kind, each in runs.items()
    ]
    print(f"{'checkpoints':>16} {'ingest':>8} {'peak RSS':>9} {'number':>7} {'they took':>10} {'share':>6} {'MiB':>6}")
    for row in rows:
        print(
            f"{row['kind']:>16} {row['ingest_s']:7.1f}s {row['peak_rss_bytes'] / 2**20:9.0f} {row['checkpoints']:7g} "
            f"{row['checkpoint_s']:9.2f}s {row['share']:6.1%} {row['checkpoint_bytes'] / 2**20:6.1f}"
        )
    result = {
        "benchmark": "checkpoints",
        "date": datetime.date.today().isoformat(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        **versions("av"),
        "minutes": arguments.minutes,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
