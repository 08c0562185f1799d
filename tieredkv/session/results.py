"""Results: an answer with its statistics, and the statistics of an ingest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tieredkv.cache.counters import Selection
from tieredkv.evidence.moments import Evidence, Moment
from tieredkv.evidence.named_times import NamedTime

FinishReason = Literal["stop", "length"]
"""Why an answer ended: by itself (an end token, a stop string, a caller's criterion), or at `max_new_tokens` or
`max_time`."""


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
    """Most device bytes ever allocated by this session, prefill included."""
    kv_host_bytes: int
    """Keys and values allocated in host memory."""
    static_heads: int
    dynamic_heads: int
    selected_chunks: int
    hit_rate: float | None
    """Share of the selected chunks that were already on the device; None if no head retrieves."""
    unseen_mass: float | None
    """Share of attention mass on chunks that dynamic heads did not attend to, estimated from digests, mean over steps:
    a large value means that the budget is too small for this prompt. None if no head ranks chunks by digests that
    estimate it."""
    moved_bytes: int
    """Copied from host to device for this answer: the past in prefill, pool, digests, missed and prefetched chunks."""
    prefetched_bytes: int
    """Of these, copied before a step needed them: for a predicted query, or for heads that may reuse a choice."""
    ingest_s: float
    """Seconds to decode, encode and prefill the video (once per session)."""
    ttft_s: float
    """Seconds to the first token of this question, without the ingest."""
    tpot_ms: float | None
    """Milliseconds per token after the first, mean; None for a one-token answer."""
    decode_path: str
    """How tokens were decoded: "eager"; on a card "graph", captured once and replayed, or "eager: " and the reason."""
    disk_read_bytes: int = 0
    """Read from disk for this answer, where host memory holds a part of the cache: the past in prefill, and chunks that
    were neither on the device nor in host memory."""
    disk_hit_rate: float | None = None
    """Share of the chunks copied to the device that were in host memory already; None if all of them always are."""
    damaged: tuple[tuple[float, float], ...] = ()
    """With `skip_damaged`: the seconds of the video, from and to, for which the picture before them was shown."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class IngestStats:
    """Measurements of one video's ingest. The three stages run at once; their seconds exclude waiting."""

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
    """Past keys and values copied back from host to device, for exact attention."""
    damaged: tuple[tuple[float, float], ...] = ()
    """With `skip_damaged`: the seconds of the video, from and to, that could not be read; the last whole picture before
    them was shown instead, at the beginning the first."""

    @staticmethod
    def total(parts: Sequence[IngestStats]) -> IngestStats:
        """Of videos ingested one after another; `damaged` are the seconds of each in turn."""
        names = [name for name in IngestStats.__slots__ if name != "damaged"]
        sums = {name: sum(getattr(part, name) for part in parts) for name in names}
        return IngestStats(**sums, damaged=tuple(span for part in parts for span in part.damaged))

    @staticmethod
    def none() -> IngestStats:
        """Of an ingest that has not begun."""
        return IngestStats(0, 0, 0.0, 0.0, 0.0, 0.0, 0)

    @property
    def overlap(self) -> float:
        """Sum of the stages' seconds / wall time: above 1 if they overlapped."""
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
    """The chunks that dynamic heads attended to, step by step, with `trace=True`."""
    evidence: Evidence | None = field(default=None, repr=False)
    """The moments of the video that question and answer attended to; None with `evidence=False`."""
    times: tuple[NamedTime, ...] | None = field(default=None, repr=False)
    """With `timestamps=True`: the times of the video that the answer names."""
    finish_reason: FinishReason = field(default="stop", repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: text, token ids, evidence and statistics; `token_evidence` and `times` if asked for,
        and `media`, the names of what moments are of, if there are several videos and pictures."""
        found = self.evidence
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "evidence": None if found is None else [moment.as_dict() for moment in found],
            **({"media": [part.source for part in found.parts]} if found is not None and found.parts else {}),
            **({} if found is None or found.tokens is None else {"token_evidence": _plain(found.tokens)}),
            **({} if self.times is None else {"times": [time.as_dict() for time in self.times]}),
            **self.stats.as_dict(),
        }


def _plain(tokens: Iterable[Iterable[Moment]]) -> list[list[dict[str, Any]]]:
    return [[moment.as_dict() for moment in moments] for moments in tokens]
