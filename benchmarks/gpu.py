"""Everything that needs a card, in one run: the GPU tests, then decode, pcie, prefill and fits, in under eight minutes.

    make gpu                                    or: python benchmarks/gpu.py --out benchmarks/results
    python benchmarks/gpu.py --only tests pcie  parts of it

Needs torch and torchvision with CUDA, triton, transformers, accelerate, numpy, pytest and av. If any is missing, a
message says how to add it, also without access to a package index. Results are JSON files in --out, each with machine,
versions and date; the output of a part is in NAME.log. If a part fails, the others still run, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEEDED = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "numpy",
    "pytest",
    "torchvision",
    "psutil",
    "safetensors",
    "PIL",
    "tqdm",
    "av",
)
PARTS = {
    # Without the project's settings, which need plugins that only other tests use.
    "tests": [
        "-m",
        "pytest",
        "-q",
        "-c",
        "/dev/null",
        "--rootdir",
        ".",
        "tests/test_gpu.py",
        "tests/ops/test_kernels.py",
    ],
    "decode": ["benchmarks/decode.py", "--shapes", "7b", "--out", "OUT/decode-gpu.json"],
    "pcie": ["benchmarks/pcie.py", "--out", "OUT/pcie-gpu.json"],
    "prefill": ["benchmarks/prefill.py", "--out", "OUT/prefill-gpu.json"],
    "fits": ["benchmarks/fits.py", "--tokens", "131072", "--out", "OUT/fits-gpu.json"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        names = " ".join({"PIL": "pillow"}.get(name, name) for name in missing)
        parser.error(
            f"missing: {names}. With a package index: pip install {names}. Without one, on another machine: "
            f"pip download --no-deps -d wheels {names}; copy the folder, then here: "
            "pip install --no-index --no-deps --target beside wheels/*.whl, and set PYTHONPATH=beside."
        )
    import torch

    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.only:
        begin = time.perf_counter()
        command = [sys.executable, *(part.replace("OUT", str(out)) for part in PARTS[name])]
        with (out / f"{name}.log").open("w") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=_environment())
        print(
            f"{name}: {'ok' if done.returncode == 0 else 'FAILED'} in {time.perf_counter() - begin:.0f} s", flush=True
        )
        if done.returncode:
            failed.append(name)
            print("".join((out / f"{name}.log").read_text().splitlines(keepends=True)[-15:]), flush=True)
    return 1 if failed else 0


def _environment() -> dict[str, str]:
    """The environment of this process, with the source tree on the path."""
    import os

    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    sys.exit(main())
