"""`GET /metrics`: what the server does, in Prometheus' text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from tieredkv.session.results import Generation

ENDS = ("served", "refused", "cancelled", "timed_out", "failed")
"""How requests for an answer ended: counts of the engine's state."""
FOUND = {"open": "open_already", "disk": "loaded", "ingest": "ingested"}
"""Where the session of a question came from, and the engine's count."""
TIERS = ("device", "host", "disk")
_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")


class Metrics:
    """The counts of one server, in a registry of their own."""

    def __init__(self, engine: Any) -> None:
        """engine: counted at each answer from now on, and asked for its state at each scrape."""
        self.registry = CollectorRegistry()
        self.registry.register(_State(engine))
        one: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("tieredkv_http_requests", "HTTP requests.", ("method", "route", "status"), **one)
        self._ttft = Histogram(
            "tieredkv_ttft_seconds", "From the start of an answer to its first token.", buckets=_TTFT_S, **one
        )
        self._tpot = Histogram(
            "tieredkv_tpot_seconds", "Time per token after the first, mean of an answer.", buckets=_TPOT_S, **one
        )
        self._prompt = Counter("tieredkv_prompt_tokens", "Tokens of the prompts of answers, films included.", **one)
        self._new = Counter("tieredkv_generated_tokens", "Tokens of answers.", **one)
        self._selected = Counter("tieredkv_selected_chunks", "Chunks that heads selected.", **one)
        self._resident = Counter("tieredkv_resident_chunks", "Of those, chunks that were on the device already.", **one)
        self._hit_rate = Gauge("tieredkv_hit_rate", "The two's ratio in the last answer that selected any.", **one)
        self._link = Counter("tieredkv_link_bytes", "Copied from host to device for answers.", **one)
        self._disk = Counter("tieredkv_disk_read_bytes", "Read from disk for answers.", **one)
        engine.observers.append(self.answered)

    def answered(self, generation: Generation) -> None:
        """Count an answer."""
        stats = generation.stats
        self._ttft.observe(stats.ttft_s)
        if stats.tpot_ms is not None:
            self._tpot.observe(stats.tpot_ms / 1000)
        self._prompt.inc(stats.prompt_tokens)
        self._new.inc(stats.new_tokens)
        self._link.inc(stats.moved_bytes)
        self._disk.inc(stats.disk_read_bytes)
        if stats.hit_rate is not None:
            self._selected.inc(stats.selected_chunks)
            self._resident.inc(round(stats.selected_chunks * stats.hit_rate))
            self._hit_rate.set(stats.hit_rate)

    def requested(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an HTTP request. route: a pattern, of which there are few."""
        self._requests.labels(method if method in _METHODS else "other", route, status).inc()

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)


class _State(Collector):
    """What the engine counts itself."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        state = self._engine.snapshot()
        yield GaugeMetricFamily("tieredkv_queue_length", "Requests that wait.", state.waiting)
        yield GaugeMetricFamily("tieredkv_running", "Requests that the model works for.", state.running)
        ended = CounterMetricFamily("tieredkv_questions", "Requests for an answer or an ingest.", labels=["end"])
        for end in ENDS:
            ended.add_metric([end], getattr(state.counts, end))
        yield ended
        found = CounterMetricFamily("tieredkv_sessions_found", "Where a question's session was.", labels=["where"])
        for where, count in FOUND.items():
            found.add_metric([where], getattr(state.counts, count))
        yield found
        sessions = GaugeMetricFamily("tieredkv_sessions", "Sessions in a tier.", labels=["tier"])
        used = GaugeMetricFamily("tieredkv_session_bytes", "What they take there.", labels=["tier"])
        most = GaugeMetricFamily("tieredkv_session_bytes_limit", "What they may take there.", labels=["tier"])
        for name in TIERS:
            tier = getattr(state, name)
            sessions.add_metric([name], tier.sessions)
            used.add_metric([name], tier.nbytes)
            most.add_metric([name], tier.most_bytes)
        yield from (sessions, used, most)


router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE_LATEST)
