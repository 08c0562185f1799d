"""Versions of the dependencies with which tieredkv is installed: python .ci/versions.py COMMAND

constraints   Write constraints.txt: the newest versions that the index serves, as pip resolves them. A line that ends
              in a comment is pinned for the reason in the comment, and is kept.
same REPORT   Exit with 1 if a report of `pip install --dry-run --report` lists anything to install but tieredkv.
floor         Print the lowest versions that pyproject.toml allows, as constraints.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
HEADER = """\
# The versions that `make demo` and `make test` install, so that what the index serves on a given day does not decide
# whether they work. Made by `make constraints`; a line with a comment is pinned for the reason given and kept as it is.
# Users' `pip install` follows the ranges in pyproject.toml instead.
"""
PINNED_BY_TORCH = re.compile(r"^(nvidia|cuda)-|^triton$")
"""Packages whose exact versions torch requires, on some platforms."""


def pinned_lines(text: str) -> dict[str, str]:
    """Lines of a constraints file with a reason, by package."""
    lines = [line.strip() for line in text.splitlines() if not line.startswith("#")]
    return {line.split("==")[0]: line for line in lines if "#" in line}


def newest(pinned: dict[str, str]) -> dict[str, str]:
    """Names and versions of all that `pip install -e ".[dev]"` would install, without installing it."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints, tempfile.TemporaryDirectory() as folder:
        constraints.write("\n".join(pinned.values()) + "\n")
        constraints.flush()
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*pip, "-c", constraints.name, "--report", report, "-e", f"{ROOT}[dev]"], check=True)
        installs = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    names = {re.sub(r"[-_.]+", "-", item["name"]).lower(): item["version"] for item in installs}
    return {name: version for name, version in sorted(names.items()) if name != "tieredkv"}


def write_constraints() -> None:
    """Update constraints.txt. Local versions (`2.14.1+cpu`) are written without their suffix."""
    pinned = pinned_lines(CONSTRAINTS.read_text() if CONSTRAINTS.exists() else "")
    lines = [
        pinned.get(name, f"{name}=={version.split('+')[0]}")
        for name, version in newest(pinned).items()
        if not PINNED_BY_TORCH.search(name)
    ]
    CONSTRAINTS.write_text(HEADER + "\n".join(lines) + "\n")


def floor() -> list[str]:
    """`name==X.*` for every dependency that pyproject.toml allows from version X."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [re.sub(r">=\s*([\d.]+).*", r"==\1.*", dependency) for dependency in dependencies]


def same(report: Path) -> bool:
    """Whether a report of pip lists nothing to install but tieredkv itself."""
    installs = json.loads(report.read_text())["install"]
    return {item["metadata"]["name"] for item in installs} <= {"tieredkv"}


def main() -> None:
    command = sys.argv[1:]
    if command == ["constraints"]:
        write_constraints()
    elif command[:1] == ["same"] and len(command) == 2:
        sys.exit(not same(Path(command[1])))
    elif command == ["floor"]:
        print("\n".join(floor()))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
