"""tieredkv: long-video question answering on small GPUs, with the key/value cache in two memory tiers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tieredkv.aio import AsyncAnswerStream
    from tieredkv.api import agenerate, generate, load_session, open_session
    from tieredkv.attention.interface import use_attention
    from tieredkv.cache import TieredCache
    from tieredkv.config import TierConfig
    from tieredkv.errors import (
        BudgetError,
        OptionError,
        PromptError,
        SessionError,
        TieredKVError,
        UnsupportedModelError,
        VideoError,
    )
    from tieredkv.evidence import Evidence, Moment
    from tieredkv.evidence_page import save_evidence
    from tieredkv.plan_table import MemoryPlan
    from tieredkv.planner import plan
    from tieredkv.session import VideoSession
    from tieredkv.stats import Generation, IngestStats, Stats
    from tieredkv.streaming import AnswerStream

__version__ = "0.1.0.dev0"

_HOME = {
    "agenerate": "api",
    "generate": "api",
    "load_session": "api",
    "open_session": "api",
    "plan": "planner",
    "AsyncAnswerStream": "aio",
    "use_attention": "attention.interface",
    "TieredCache": "cache",
    "TierConfig": "config",
    "BudgetError": "errors",
    "OptionError": "errors",
    "PromptError": "errors",
    "SessionError": "errors",
    "TieredKVError": "errors",
    "UnsupportedModelError": "errors",
    "VideoError": "errors",
    "VideoSession": "session",
    "Evidence": "evidence",
    "Moment": "evidence",
    "save_evidence": "evidence_page",
    "Generation": "stats",
    "IngestStats": "stats",
    "MemoryPlan": "plan_table",
    "Stats": "stats",
    "AnswerStream": "streaming",
}

__all__ = [
    "AnswerStream",
    "AsyncAnswerStream",
    "BudgetError",
    "Evidence",
    "Generation",
    "IngestStats",
    "MemoryPlan",
    "Moment",
    "OptionError",
    "PromptError",
    "SessionError",
    "Stats",
    "TierConfig",
    "TieredCache",
    "TieredKVError",
    "UnsupportedModelError",
    "VideoError",
    "VideoSession",
    "agenerate",
    "generate",
    "load_session",
    "open_session",
    "plan",
    "save_evidence",
    "use_attention",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: importing transformers takes seconds."""
    if name not in _HOME:
        raise AttributeError(f"module 'tieredkv' has no attribute {name!r}")
    return getattr(import_module(f"tieredkv.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
