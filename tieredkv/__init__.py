"""tieredkv: long-video question answering on small GPUs, with the key/value cache in two memory tiers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tieredkv.api import agenerate, generate, load_session, open_session
    from tieredkv.cache.tiered_cache import TieredCache
    from tieredkv.config import TierConfig
    from tieredkv.errors import (
        BudgetError,
        OptionError,
        OutputError,
        PromptError,
        SessionError,
        TieredKVError,
        UnsupportedModelError,
        VideoError,
    )
    from tieredkv.evidence.moments import Evidence, Moment
    from tieredkv.evidence.save import save_evidence
    from tieredkv.models.switch import use_attention
    from tieredkv.planning.forecast import plan
    from tieredkv.planning.report import MemoryPlan
    from tieredkv.policy.base import Policy
    from tieredkv.policy.presets import POLICIES
    from tieredkv.session.aio import AsyncAnswerStream
    from tieredkv.session.results import Generation, IngestStats, Stats
    from tieredkv.session.stream import AnswerStream
    from tieredkv.session.video_session import VideoSession
    from tieredkv.video.media import Picture, Video

__version__ = "0.1.0.dev0"

_HOME = {
    "agenerate": "api",
    "generate": "api",
    "load_session": "api",
    "open_session": "api",
    "plan": "planning.forecast",
    "AsyncAnswerStream": "session.aio",
    "use_attention": "models.switch",
    "POLICIES": "policy.presets",
    "Policy": "policy.base",
    "TieredCache": "cache.tiered_cache",
    "TierConfig": "config",
    "BudgetError": "errors",
    "OptionError": "errors",
    "OutputError": "errors",
    "PromptError": "errors",
    "SessionError": "errors",
    "TieredKVError": "errors",
    "UnsupportedModelError": "errors",
    "VideoError": "errors",
    "VideoSession": "session.video_session",
    "Evidence": "evidence.moments",
    "Moment": "evidence.moments",
    "save_evidence": "evidence.save",
    "Generation": "session.results",
    "IngestStats": "session.results",
    "MemoryPlan": "planning.report",
    "Picture": "video.media",
    "Video": "video.media",
    "Stats": "session.results",
    "AnswerStream": "session.stream",
}

__all__ = [
    "POLICIES",
    "AnswerStream",
    "AsyncAnswerStream",
    "BudgetError",
    "Evidence",
    "Generation",
    "IngestStats",
    "MemoryPlan",
    "Moment",
    "OptionError",
    "OutputError",
    "Picture",
    "Policy",
    "PromptError",
    "SessionError",
    "Stats",
    "TierConfig",
    "TieredCache",
    "TieredKVError",
    "UnsupportedModelError",
    "Video",
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
