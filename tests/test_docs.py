"""What README and examples show runs as shown."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_file_the_readme_links_to_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_the_readme_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", README)) - {"a", "it"}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.model
def test_the_readme_session_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (block,) = [b for b in blocks if "open_session" in b]
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    *table, colour, chain, stats, talk, again = capsys.readouterr().out.strip().splitlines()
    assert any("visual tokens" in line for line in table)
    assert len(colour.split()) == 1
    assert talk.startswith(f"{colour} (('what colour was the ")
    assert again == colour
    assert len(chain.split()) == 6
    assert "hit_rate" in stats


@pytest.mark.model
@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_run_unchanged(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [example])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    assert "on the device" in capsys.readouterr().out
