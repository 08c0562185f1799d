"""Build sdist and wheel, and see that the wheel works where the checkout is not: python .ci/package.py [--quick]

The wheel is built from the sdist, checked for what it must and must not hold, and installed in a new environment, in
which the demo runs from an empty folder. Both files are left in dist/. --quick: the new environment borrows the
dependencies of the one this runs in instead of installing them (several GB), and the demo is a short one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 20_000_000
IN_WHEEL = {
    "tieredkv/__init__.py",
    "tieredkv/py.typed",
    "tieredkv/evidence_page.html",
    "tieredkv/tiny/weights/model.safetensors",
    "tieredkv/tiny/weights/chat_template.jinja",
}
IN_SDIST = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    "constraints.txt",
    "mkdocs.yml",
    "tests/conftest.py",
    "examples/quickstart.py",
}
UNWANTED = re.compile(r"(^|/)(__pycache__|\.venv|\.git|build|dist|\.[a-z]+_cache|\.hypothesis)(/|$)|\.py[co]$|\.tkv$")


def version() -> str:
    """The one place that says it."""
    return re.findall(r'^__version__ = "(.+)"$', (ROOT / "tieredkv/__init__.py").read_text(), re.MULTILINE)[0]


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel made of it."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def problems(names: set[str], wanted: set[str], file: Path) -> list[str]:
    """What is wrong with the contents or the size of a built file."""
    found = [f"{file.name} lacks {name}" for name in sorted(wanted - names)]
    found += [f"{file.name} holds {name}" for name in sorted(names) if UNWANTED.search(name)]
    if file.stat().st_size > MOST_BYTES:
        found.append(f"{file.name} has {file.stat().st_size:,} bytes, over {MOST_BYTES:,}")
    return found


def check_sdist(file: Path) -> list[str]:
    with tarfile.open(file) as archive:
        names = {member.name.split("/", 1)[-1] for member in archive if member.isfile()}
    return problems(names, IN_SDIST | IN_WHEEL, file)


def check_wheel(file: Path) -> list[str]:
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        info = f"tieredkv-{version()}.dist-info"
        alone = {"tieredkv/benchmarks/origin.py", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"}
        found = problems(names, IN_WHEEL | alone, file)
        found += [f"{file.name} holds {name}" for name in sorted(names) if name.split("/")[0] not in ("tieredkv", info)]
        if f"{info}/METADATA" in names:
            stated = Parser().parsestr(archive.read(f"{info}/METADATA").decode())["Version"]
            found += [] if stated == version() else [f"{file.name} says version {stated}, the package {version()}"]
        else:
            found.append(f"{file.name} is not of version {version()}")
    return found


def run_installed(wheel: Path, quick: bool) -> None:
    """Install the wheel in an environment of its own and run the demo there, from an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        environment, empty = Path(folder, "env"), Path(folder, "empty")
        empty.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
        python = environment / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", *(["--no-deps"] if quick else []), str(wheel)], check=True)
        if quick:  # after installing, or pip would take this environment's own tieredkv for an older version to remove
            site = sysconfig.get_path("purelib", vars={"base": str(environment)})
            Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([*pip, "check"], check=True)

        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        variables |= {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1"}
        where = subprocess.run(
            [python, "-c", "import tieredkv; print(tieredkv.__file__)"],
            cwd=empty,
            env=variables,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        if not where.startswith(str(environment)):
            sys.exit(f"package: the wheel is not what is imported, but {where.strip()}")
        demo = [environment / "bin" / "tieredkv", "demo", *(["--minutes", "1", "--share", "0.5"] if quick else [])]
        subprocess.run(demo, cwd=empty, env=variables, check=True)
        if left := list(empty.iterdir()):
            sys.exit(f"package: the demo left {', '.join(path.name for path in left)} behind")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="borrow this environment's dependencies; a short demo")
    arguments = parser.parse_args()
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    sdist, wheel = build(dist)
    if found := check_sdist(sdist) + check_wheel(wheel):
        sys.exit("package: " + "\npackage: ".join(found))
    run_installed(wheel, arguments.quick)
    for file in (sdist, wheel):
        print(f"{file.relative_to(ROOT)}  {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"package: {' '.join(map(str, error.cmd))} failed with exit code {error.returncode}")
