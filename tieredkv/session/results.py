"""What a run did: counters kept by the cache, and the `Stats` a user gets with each answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tieredkv.cache.counters import Selection
from tieredkv.evidence.moments import Evidence


@dataclass(frozen=True, slots=True)
class Stats:
    """Measurements of one answer."""

    prompt_tokens: int
    visual_tokens: int
    new_tokens: int
    kv_full_bytes: int
    """Keys and values of the prompt and the answer in a full cache."""
    kv_cap_bytes: int
    kv_device_peak_bytes: int
    """Most device bytes ever held by this session, prefill included."""
    kv_host_bytes: int
    """Keys and values allocated in host memory."""
    static_heads: int
    dynamic_heads: int
    selected_chunks: int
    hit_rate: float | None
    """Share of the selected chunks that were on the device already; None when no head retrieves."""
    unseen_mass: float | None
    """Share of attention mass that dynamic heads did not see, estimated from what is on the device, mean over steps:
    the sign that a budget is too small for this prompt. None when no head ranks chunks, or its digests cannot tell."""
    moved_bytes: int
    """Copied from host to device while answering: past streamed, pool and digests, chunks missed and prefetched."""
    prefetched_bytes: int
    ingest_s: float
    """Decoding, encoding and prefilling the video (once per session)."""
    ttft_s: float
    """Time to first token of this question, ingest excluded."""
    tpot_ms: float | None
    """Mean time per token after the first; None for a one-token answer."""
    decode_path: str
    """How tokens were decoded: "eager"; on a card "graph", captured once and replayed, or "eager: " and why not."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class IngestStats:
    """Measurements of one video's ingest. The three stages ran at once; each one's seconds are those it worked."""

    frames: int
    visual_tokens: int
    decode_s: float
    """Reading and sampling the file."""
    encode_s: float
    """Resizing, patches and vision tower."""
    prefill_s: float
    """The decoder model over the prompt up to the question."""
    wall_s: float
    """From the first frame's request to the last token cached."""
    streamed_bytes: int
    """Past keys and values copied from host to device again, for exact attention."""

    @property
    def overlap(self) -> float:
        """Sum of the stages' seconds / wall time: above 1 where they ran at once."""
        return (self.decode_s + self.encode_s + self.prefill_s) / self.wall_s

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "overlap": self.overlap}


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer."""

    text: str
    token_ids: list[int]
    stats: Stats
    trace: list[Selection] | None = field(default=None, repr=False)
    """What dynamic heads looked at, step by step, when asked for with `trace=True`."""
    evidence: Evidence | None = field(default=None, repr=False)
    """The moments of the video that question and answer looked at, unless left out with `evidence=False`."""
