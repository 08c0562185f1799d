"""PyAV is needed for video files alone: frames as arrays are answered about where it is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tieredkv

SCRIPT = """
import sys
sys.modules["av"] = None  # importing it raises, as if it were not installed
import numpy, tieredkv
from tieredkv.tiny.model import load
model, processor = load()
frames = numpy.random.default_rng(0).integers(0, 256, (40, 56, 56, 3), dtype=numpy.uint8)
with tieredkv.open_session(model, frames, processor=processor, fps=4, gpu_kv_gb=0.5) as session:
    print(session.ask("what colour was the star ?", max_new_tokens=2).stats.new_tokens)
"""


@pytest.mark.subprocess
@pytest.mark.slow
@pytest.mark.model
def test_a_session_over_arrays_needs_no_pyav():
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1


def test_a_file_is_refused_without_pyav(monkeypatch, tmp_path, video_model, processor):
    path = tmp_path / "film.mp4"
    path.write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(tieredkv.VideoError, match=r"without PyAV .*: pip install av, or give its frames as arrays"):
        tieredkv.open_session(video_model, path, processor=processor, gpu_kv_gb=0.5)
