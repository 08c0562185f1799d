"""Build sdist and wheel, and test the wheel outside the checkout: python .ci/package.py [--quick]

Builds the wheel from the sdist, checks its contents, installs it in a new environment, and runs the demo there from an
empty folder. Leaves both files in dist/. --quick: the new environment uses the dependencies of the current one instead
of installing them (several GB), and the demo is short.
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
    "tieredkv/evidence/page.html",
    "tieredkv/serve/page/static/index.html",
    "tieredkv/serve/page/static/page.css",
    "tieredkv/serve/page/static/page.js",
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
    "Dockerfile",
    "tests/conftest.py",
    "examples/quickstart.py",
}
UNWANTED = re.compile(r"(^|/)(__pycache__|\.venv|\.git|build|dist|\.[a-z]+_cache|\.hypothesis)(/|$)|\.py[co]$|\.tkv$")


def version() -> str:
    """The version that the package states."""
    return re.findall(r'^__version__ = "(.+)"$', (ROOT / "tieredkv/__init__.py").read_text(), re.MULTILINE)[0]


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel built from it."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], check=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def check_contents(names: set[str], required: set[str], file: Path) -> list[str]:
    """Errors in the contents or the size of a built file."""
    errors = [f"{file.name} lacks {name}" for name in sorted(required - names)]
    errors += [f"{file.name} contains {name}" for name in sorted(names) if UNWANTED.search(name)]
    if file.stat().st_size > MOST_BYTES:
        errors.append(f"{file.name} has {file.stat().st_size:,} bytes, over {MOST_BYTES:,}")
    return errors


def check_sdist(file: Path) -> list[str]:
    with tarfile.open(file) as archive:
        names = {member.name.split("/", 1)[-1] for member in archive if member.isfile()}
    return check_contents(names, IN_SDIST | IN_WHEEL, file)


def check_wheel(file: Path) -> list[str]:
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        info = f"tieredkv-{version()}.dist-info"
        only_here = {"tieredkv/benchmarks/origin.py", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"}
        errors = check_contents(names, IN_WHEEL | only_here, file)
        errors += [f"{file.name} contains {name}" for name in sorted(names) if "/benchmarks/weights/" in name]
        outside = [name for name in sorted(names) if name.split("/")[0] not in ("tieredkv", info)]
        errors += [f"{file.name} contains {name}" for name in outside]
        if f"{info}/METADATA" in names:
            stated = Parser().parsestr(archive.read(f"{info}/METADATA").decode())["Version"]
            errors += [] if stated == version() else [f"{file.name} states version {stated}, the package {version()}"]
        else:
            errors.append(f"{file.name} does not have version {version()}")
    return errors


def run_installed(wheel: Path, quick: bool) -> None:
    """Install the wheel in a new environment and run the demo there, from an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        environment, empty = Path(folder, "env"), Path(folder, "empty")
        empty.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
        python = environment / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", *(["--no-deps"] if quick else []), str(wheel)], check=True)
        if quick:  # after installing, or pip would try to remove the current environment's tieredkv
            site = sysconfig.get_path("purelib", vars={"base": str(environment)})
            Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([*pip, "check"], check=True)

        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        variables |= {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1"}
        location = subprocess.run(
            [python, "-c", "import tieredkv; print(tieredkv.__file__)"],
            cwd=empty,
            env=variables,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        if not location.startswith(str(environment)):
            sys.exit(f"package: not the wheel is imported, but {location.strip()}")
        demo = [environment / "bin" / "tieredkv", "demo", *(["--minutes", "1", "--share", "0.5"] if quick else [])]
        subprocess.run(demo, cwd=empty, env=variables, check=True)
        if files := list(empty.iterdir()):
            sys.exit(f"package: the demo left {', '.join(path.name for path in files)} behind")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="use this environment's dependencies; a short demo")
    arguments = parser.parse_args()
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    sdist, wheel = build(dist)
    if errors := check_sdist(sdist) + check_wheel(wheel):
        sys.exit("package: " + "\npackage: ".join(errors))
    run_installed(wheel, arguments.quick)
    for file in (sdist, wheel):
        print(f"{file.relative_to(ROOT)}  {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"package: {' '.join(map(str, error.cmd))} failed with exit code {error.returncode}")
