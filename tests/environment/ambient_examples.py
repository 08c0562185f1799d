"""A question and settings that the tests of torch's modes share."""

from __future__ import annotations

QUESTION = "what colour was the star ?"
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
TIGHT = {"fps": 4, "gpu_kv_gb": 1, "budget_ratio": 0.4, "chunk_tokens": 8, "text_window": 4}
