"""What is wrong with paths, options and sessions is said before torch, transformers or PyAV is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tieredkv.storage import tensor_file

HEAVY = ("torch", "transformers", "torchvision", "av", "accelerate", "safetensors")
REFUSED = {
    "ask --help": "Answer one question",
    "--version": "",
    "bench nothing": "'nothing' is not a benchmark",
    "ask gone.mp4 Q": "gone.mp4: no such file.",
    "ask gone.mp4": "gone.mp4 is a file, and the question is missing",
    "ask gone.mxf": "gone.mxf is a file, and the question is missing",
    "ask film.mp4": "film.mp4 is a file, and the question is missing",
    "ask later.tkv Q": "later.tkv is a session, not a video: give it as --session later.tkv.",
    "ask gone.tkv": "gone.tkv is a session: ask it as in tieredkv ask --session gone.tkv",
    "chat gone.tkv": "gone.tkv is a session, not a video",
    "plan gone.tkv": "gone.tkv is a session, not a video",
    "ask . Q": ". is a folder, not a video file.",
    "ask empty.mp4 Q": "empty.mp4: not a readable video file (it is empty).",
    "ask film.mp4 Q --fps 0": "fps=0.0 is not valid",
    "ask film.mp4 Q --max-frames 0": "max_frames=0 is not valid",
    "ask film.mp4 Q --max-pixels 0": "max_pixels=0 is not valid",
    "ask film.mp4 Q --start 3 --end 2": "end=2.0 is not valid",
    "ask film.mp4 Q --start 1:00 --end 0:30": "end=30.0 is not valid: give seconds after start=60 (1:00)",
    "ask film.mp4 Q --start noon": "start='noon' is not valid: give seconds, or a time as in 1:00",
    "ask film.mp4 Q -m /nowhere/model": "/nowhere/model: no usable model found there",
    "ask http://127.0.0.1:9/film.mp4 Q --allow-url -m /nowhere/model": "/nowhere/model: no usable model found there",
    "chat http://127.0.0.1:9/film.mp4 --allow-url -m /nowhere/model": "/nowhere/model: no usable model found there",
    "ask film.mp4 Q -m model.gguf": "model.gguf is in GGUF",
    "plan film.mp4 -m /nowhere/model": "/nowhere/model: no usable model found there",
    "plan 1000 -m /nowhere/model": "/nowhere/model: no usable model found there",
    "run questions.jsonl -o answers.jsonl -m /nowhere/model": "/nowhere/model: no usable model found there",
    "ask film.mp4 Q --gpu-kv-gb 0": "gpu_kv_gb=0.0 is not valid",
    "ask film.mp4 Q --host-kv-gb -1": "host_kv_gb=-1.0 is not valid",
    "ask film.mp4 Q --step-overhead -1": "step_overhead=-1.0 is not valid: give None, or a number of at least 0",
    "ask film.mp4 Q --host-kv-bits 2": "host_kv_bits=2 is not valid: give None or one of 16, 8, 4",
    "ask film.mp4 Q --policy best": "policy='best' is not valid: give one of hybridkv, ",
    "ask film.mp4 Q --max-new-tokens 0": "max_new_tokens=0 is not valid",
    "ask film.mp4 Q --evidence page.pdf": "page.pdf: give a file name that ends in .png or .html.",
    "ask film.mp4 Q --evidence nowhere/page.html": "there is no folder",
    "ask film.mp4 Q --session nowhere/film.tkv": "there is no folder",
    "ask film.mp4 Q --session talked.tkv": "talked.tkv.chat is damaged, or another program's",
    "run urls.jsonl -o answers.jsonl --allow-url": "http://127.0.0.1:9/film.mp4: without -m only the bundled toy",
    "ask Q --session gone.tkv": "gone.tkv: no such file; give a video too",
    "ask Q --session film.mp4": "film.mp4 is not a tieredkv file, or its header is damaged.",
    "ask Q --session cut.tkv": "cut.tkv is cut short",
    "ask Q --session tensors.tkv": "tensors.tkv holds no session (there is no 'model' in it).",
    "ask Q --session later.tkv": "later.tkv was written by a newer tieredkv (format 7): update.",
    "chat gone.mp4": "gone.mp4: no such file.",
    "chat --session film.mp4": "film.mp4 is not a tieredkv file",
    "serve --host 0.0.0.0": "lets other machines in without a key",
    "serve --videos gone": "--videos gone: there is no such folder",
    "serve --host 192.0.2.1 --insecure": "of 192.0.2.1 cannot be used",
    "serve -m /nowhere/model": "/nowhere/model: no usable model found there",
    "plan gone.mp4": "gone.mp4: no such file.",
    "plan film.mp4 --fps 0": "fps=0.0 is not valid",
    "plan film.mp4 --card best": "card='best' is not known",
    "plan film.mp4 --link best": "link='best' is not known",
    "run gone.jsonl -o answers.jsonl": "gone.jsonl cannot be read",
    "run film.mp4 -o answers.jsonl": "line 1 is not JSON",
    "run questions.jsonl -o answers.jsonl --policy best": "policy='best' is not valid",
    "run questions.jsonl -o nowhere/answers.jsonl": "nowhere/answers.jsonl cannot be written",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    (folder / "film.mp4").write_bytes(b"not a film")
    (folder / "empty.mp4").touch()
    (folder / "talked.tkv.chat").write_text("not a conversation")
    (folder / "urls.jsonl").write_text('{"video": "http://127.0.0.1:9/film.mp4", "question": "what ?"}\n')
    (folder / "questions.jsonl").write_text('{"video": "film.mp4", "question": "what ?"}\n')
    tensor_file.write(folder / "tensors.tkv", {}, {"a": torch.zeros(3)})
    (folder / "cut.tkv").write_bytes((folder / "tensors.tkv").read_bytes()[:-9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "FORMAT_VERSION", 7)
        tensor_file.write(folder / "later.tkv", {}, {})
    return folder


@pytest.mark.subprocess
def test_refusals_import_nothing_slow(folder):
    """All in one process, which has imported nothing but what the earlier ones needed."""
    script = f"""
import contextlib, io, json, sys
from tieredkv import cli

results = {{}}
for line in {list(REFUSED)!r}:
    sys.argv = ["tieredkv", *line.split()]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    results[line] = code, said.getvalue(), [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps(results))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=folder)
    for line, (code, said, imported) in json.loads(done.stdout).items():
        assert REFUSED[line] in said, line
        assert code == (0 if line.endswith(("--help", "--version")) else 2), line
        assert imported == [], line
