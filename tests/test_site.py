"""The site: it builds, needs no other site, and its tables and headings agree with the code."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tieredkv
from tieredkv.planning.weight_bytes import weight_bytes
from tieredkv.policy.presets import POLICIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.subprocess
def test_every_page_is_in_the_site_and_fetches_nothing_from_elsewhere(site):
    pages = {path.stem for path in site.glob("*.html")} - {"404"}
    assert pages == {path.stem for path in DOCS.glob("*.md")}
    for path in site.glob("*.html"):
        text = path.read_text()
        assert f'"{path.name}"' in (site / "index.html").read_text() or path.stem in ("404", "index"), "not in the nav"
        fetched = re.findall(r'<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]+)"', text)
        assert fetched == [], path.name


@pytest.mark.subprocess
def test_the_reference_holds_every_public_name(site):
    text = (site / "api.html").read_text()
    missing = [name for name in tieredkv.__all__ if not re.search(rf'id="tieredkv\.[\w.]+\.{name}"', text)]
    assert missing == []


def test_the_tables_are_what_the_planner_and_the_policies_say(monkeypatch):
    made = load(DOCS / "make_tables.py")
    for page in made.PAGES:
        text = (DOCS / page).read_text()
        assert made.filled(text) == text, f"{page}: run python docs/make_tables.py"
    assert {f"## {name}" for name in POLICIES} <= set((DOCS / "policies.md").read_text().splitlines())


def test_published_models_have_the_parameters_that_their_names_say():
    """In billions, without drafting layers."""
    made = load(DOCS / "make_tables.py")
    named = {"Qwen3.5-4B": 4.54, "Qwen3.5-9B": 9.41, "Qwen3.6-27B": 27.4, "Qwen3.6-35B-A3B": 35.1}
    named |= {"Gemma 4 E4B": 7.94, "Gemma 4 26B-A4B": 25.8, "Gemma 4 31B": 31.3}  # with towers of 0.48, 0.57 and 0.58
    for name, billions in named.items():
        sizes = weight_bytes(made.video_config(name), torch.bfloat16)
        assert (sizes["decoder_bytes"] + sizes["vision_bytes"]) / 2e9 == pytest.approx(billions, rel=2e-3), name


def test_shapes_are_those_of_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    made, shapes = load(DOCS / "make_tables.py"), load(ROOT / "benchmarks" / "synthetic.py").SHAPES
    for name, key in (("Qwen2.5-VL-3B", "3b"), ("Qwen2.5-VL-7B", "7b")):
        text = made.video_config(name).text_config
        assert {field: getattr(text, field) for field in shapes[key]} == shapes[key]


def messages() -> set[str]:
    """Every string in the package, with … for what is filled in."""

    def said(node: ast.AST) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        return None

    found: set[str] = set()
    for path in (ROOT / "tieredkv").rglob("*.py"):
        found |= {text for node in ast.walk(ast.parse(path.read_text())) if (text := said(node))}
    return found


def test_what_troubleshooting_answers_is_what_the_code_says():
    headings = re.findall(r"^### (.+)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 20
    known = messages()
    patterns = {heading: re.compile(re.escape(heading).replace("…", ".*"), re.DOTALL) for heading in headings}
    assert [heading for heading, said in patterns.items() if not any(map(said.search, known))] == []
