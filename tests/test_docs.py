"""What README and docs show runs as shown."""

from __future__ import annotations

import re
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
