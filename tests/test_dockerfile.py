"""The Dockerfile: what it copies is there, and the server does not run as root."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DockerfileParser = pytest.importorskip("dockerfile_parse").DockerfileParser
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """Instructions and their values. From a copy: the parser may write."""
    path = tmp_path_factory.mktemp("docker") / "Dockerfile"
    path.write_bytes((ROOT / "Dockerfile").read_bytes())
    structure = DockerfileParser(str(path)).structure
    return [(step["instruction"], step["value"]) for step in structure if step["instruction"] != "COMMENT"]


def last(steps: list[tuple[str, str]], name: str) -> str:
    return [value for instruction, value in steps if instruction == name][-1]


def test_every_instruction_is_one(steps):
    known = "FROM ARG RUN WORKDIR COPY USER VOLUME EXPOSE ENV STOPSIGNAL HEALTHCHECK ENTRYPOINT"
    assert {instruction for instruction, _ in steps} <= set(known.split())
    assert steps[0][0] == "FROM"


def test_the_base_is_slim_and_of_a_stated_version(steps):
    image, _, tag = steps[0][1].partition(":")
    assert image == "python"
    assert tag.endswith("-slim")
    assert tuple(map(int, tag.removesuffix("-slim").split("."))) >= (3, 11)


def test_what_is_copied_is_there_and_not_ignored(steps):
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [name for instruction, value in steps if instruction == "COPY" for name in value.split()[:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists() or name not in sent] == []


def test_nothing_is_installed_after_root_is_given_up(steps):
    names = [instruction for instruction, _ in steps]
    assert last(steps, "USER") == "tieredkv"
    assert "RUN" not in names[names.index("USER") :]


def test_pip_keeps_no_cache_and_knows_the_tested_versions(steps):
    installs = [part for name, value in steps if name == "RUN" for part in value.split("&&") if "pip install" in part]
    assert installs
    assert [part for part in installs if "--no-cache-dir" not in part or "-c constraints.txt" not in part] == []


def test_it_serves_says_that_it_lives_and_needs_a_key(steps):
    assert json.loads(last(steps, "ENTRYPOINT")) == ["tieredkv", "serve"]
    assert "/health" in last(steps, "HEALTHCHECK")
    stated = " ".join(value for name, value in steps if name == "ENV")
    assert "TIEREDKV_HOST=0.0.0.0" in stated
    assert "KEY" not in stated
    assert "insecure" not in str(steps)
