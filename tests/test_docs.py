"""What README and examples show runs as shown."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
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


@pytest.mark.slow
@pytest.mark.model
def test_the_command_lines_examples_run(tmp_path, short_video):
    text = (ROOT / "docs" / "command-line.md").read_text()
    shell, (questions,), (settings,) = (
        re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("sh", "json", "toml")
    )
    (tmp_path / "film.mp4").write_bytes(short_video.read_bytes())
    (tmp_path / "questions.jsonl").write_text(questions)
    (tmp_path / "tieredkv.toml").write_text(settings)
    (tmp_path / "tieredkv").write_text(f'#!/bin/sh\nexec {sys.executable} -m tieredkv "$@"\n')
    (tmp_path / "tieredkv").chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"XDG_CONFIG_HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    made = []
    for command in "".join(shell).splitlines():
        if " bench " in command:  # takes its time, and is run by test_cli_bench.py
            continue
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 or command.startswith("tieredkv doctor"), done.stderr
        made.append(done.stdout)
    moon, cup, again, *_ = made
    assert again == moon
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [moon.strip(), json.loads(cup)["text"]]
    assert json.loads(made[-1])["checks"]
    assert {part.split()[1] for part in "".join(shell).replace("| ", "\n").splitlines() if "tieredkv " in part[:9]} == {
        "ask",
        "chat",
        "run",
        "plan",
        "policies",
        "bench",
        "doctor",
    }


@pytest.mark.model
def test_the_readme_streams(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    opening, streaming = [b for b in blocks if "import" in b and "scene" in b]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(opening, "README.md", "exec"), names)
    capsys.readouterr()
    exec(compile(streaming, "README.md", "exec"), names)
    chat, awaited = capsys.readouterr().out.strip().splitlines()
    text = chat.removesuffix(" (7 tokens)")
    assert len(text.split()) == 6
    assert awaited.startswith(f"{text} ")
    assert len(awaited.split()) == 7


@pytest.mark.model
@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_run_unchanged(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [example])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    assert "on the device" in capsys.readouterr().out


def test_the_policy_contributing_shows_is_one(text_model, prompt_ids, monkeypatch):
    import tieredkv
    from tieredkv.policy.presets import POLICIES

    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    monkeypatch.setitem(POLICIES, "loud", names["POLICY"])
    options = {"gpu_kv_gb": 1, "budget_ratio": 0.5, "policy": "loud", "recent_window": 8, "text_window": 16}
    with tieredkv.use_attention(text_model), tieredkv.TieredCache(text_model.config, **options) as cache:
        text_model.generate(prompt_ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert cache.counters.static_heads > 0
        assert cache.counters.dynamic_heads == 0
