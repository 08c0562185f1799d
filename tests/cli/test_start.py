"""What a question about a saved session imports: nothing that only other commands or videos need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from command_line import run

NOT_NEEDED = (
    "av", "matplotlib", "pandas", "scipy", "sklearn", "cv2", "IPython", "peft", "timm", "num2words", "bitsandbytes",
    "tieredkv.batch", "tieredkv.demo", "tieredkv.doctor", "tieredkv.evidence.save", "tieredkv.planning.forecast",
    "tieredkv.tiny.train", "tieredkv.tiny.evaluate"
)  # fmt: skip
"""torch, transformers and what they import by themselves cannot be left out: docs/log.md says what they cost."""


@pytest.mark.model
@pytest.mark.subprocess
def test_a_question_about_a_saved_session_imports_only_what_it_needs(monkeypatch, capsys, short_video, tmp_path):
    saved, question = str(tmp_path / "film.tkv"), "what colour was the star ?"
    asked = ["ask", question, "--session", saved, "--max-new-tokens", "2"]
    code, expected, _ = run(monkeypatch, capsys, "ask", str(short_video), *asked[1:])
    assert code == 0
    script = f"""
import json, sys
from tieredkv.cli.app import execute

sys.argv = ["tieredkv", *{asked!r}]
try:
    execute()
finally:
    print(json.dumps([name for name in {NOT_NEEDED!r} if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    answer, imported = done.stdout.splitlines()
    assert answer == expected.strip()
    assert json.loads(imported) == []
