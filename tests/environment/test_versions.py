"""Names that differ between releases of transformers, and the versions that the tests install."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from transformers import DynamicCache, LlamaForCausalLM

from tieredkv.environment.versions import cache_argument, cache_name

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def versions() -> ModuleType:
    """`.ci/versions.py`, which the sdist does not contain."""
    path = ROOT / ".ci" / "versions.py"
    if not path.exists():
        pytest.skip("not in a checkout: .ci/versions.py is not here")
    spec = importlib.util.spec_from_file_location("ci_versions", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_cache_is_passed_by_the_name_that_the_installed_transformers_uses() -> None:
    assert cache_name() in inspect.signature(LlamaForCausalLM.forward).parameters
    cache = DynamicCache()
    assert cache_argument(cache) == {cache_name(): cache}


def test_every_dependency_has_a_line_in_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = [
        re.split(r"[\[><=]", line)[0]
        for line in project["dependencies"] + extras["dev"] + extras["plot"] + extras["cpu"]
    ]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {name for name in names if name != "tieredkv"} <= pinned


def test_a_constraint_with_a_reason_is_kept_when_the_others_are_updated(
    versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "CONSTRAINTS", tmp_path / "constraints.txt")
    versions.CONSTRAINTS.write_text("# made\nav==15.1.0  # later ones crash\nnumpy==2.0.0\n")
    monkeypatch.setattr(versions, "newest", lambda pinned: {"av": "18.1.0", "numpy": "2.4.6", "torch": "2.14.1+cpu"})
    versions.write_constraints()
    lines = versions.CONSTRAINTS.read_text().removeprefix(versions.HEADER).splitlines()
    assert lines == ["av==15.1.0  # later ones crash", "numpy==2.4.6", "torch==2.14.1"]


def test_the_floor_is_the_lowest_version_of_each_dependency(versions: ModuleType) -> None:
    floor = versions.floor()
    assert "torch==2.11.*" in floor
    assert "transformers==5.17.*" in floor
    assert len(floor) == len(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


def test_an_environment_is_the_newest_if_only_tieredkv_would_be_installed(versions, tmp_path) -> None:
    report = tmp_path / "report.json"
    for names, expected in ((["tieredkv"], True), (["torch", "tieredkv"], False)):
        report.write_text(json.dumps({"install": [{"metadata": {"name": name}} for name in names]}))
        assert versions.same(report) is expected
