from __future__ import annotations

from pathlib import Path

import pytest
from batch_files import ask


@pytest.fixture
def questions(tmp_path) -> Path:
    """Three videos, one of them missing, and a question that fails."""
    return ask(
        tmp_path,
        {"video": "b.mp4", "question": "one", "id": "first"},
        {"video": "a.mp4", "question": "zwei ü", "max_new_tokens": 3},
        {"video": "gone.mp4", "question": "three"},
        "",
        {"video": "./b.mp4", "question": "bad", "id": 4},
        {"video": "b.mp4", "question": "five"},
    )
